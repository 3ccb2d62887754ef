"""Memory tiers in a step's cost: what stays on the device, and what moves, by arithmetic."""

from collections.abc import Iterator

from moesaic.memory.memory_plan import MemoryPlan
from moesaic.memory.tier import Tier
from moesaic.planner.cost_entries import DEVICE, DISK, HOST, MovedBytes, Purpose
from moesaic.planner.step_memory import StateBytes

STREAMED_LAYERS = 2  # the one that computes, and the one that is fetched


def tier_name(tier: Tier) -> str:
    """Return the name of a tier in a cost."""
    return type(tier).__name__


def resident_weights(state: StateBytes, memory: MemoryPlan) -> int:
    """Return the bytes of weights on the device: all, or all but experts and two layers of them."""
    if memory.parameters.is_device:
        return state.weights
    layers = sorted(state.experts.values(), reverse=True)
    return state.weights - sum(layers) + sum(layers[:STREAMED_LAYERS])


def moved_bytes(
    state: StateBytes, memory: MemoryPlan, *, micro_batches: int
) -> Iterator[MovedBytes]:
    """Yield what moves between tiers in a step.

    Gradients leave after each micro-batch, and updated weights come back, unless they are streamed:
    those are fetched for each forward pass and, but for the last layer's, for each backward pass:
    at most, since experts without rows are left out there. States are updated on the host, so they
    move only from and to the disk.
    """
    streamed = 0 if memory.parameters.is_device else sum(state.experts.values())
    if streamed:
        tier = tier_name(memory.parameters)
        last = list(state.experts.values())[-1]
        yield MovedBytes(tier, DEVICE, Purpose.WEIGHTS, micro_batches * (2 * streamed - last))
    if not memory.gradients.is_device:
        tier = tier_name(memory.gradients)
        yield MovedBytes(DEVICE, tier, Purpose.GRADIENTS, micro_batches * state.gradients)
    if not memory.optimizer_states.is_device:
        yield MovedBytes(HOST, DEVICE, Purpose.WEIGHTS, state.weights - streamed)
    if tier_name(memory.optimizer_states) == DISK:
        yield MovedBytes(DISK, HOST, Purpose.STATES, state.states)
        yield MovedBytes(HOST, DISK, Purpose.STATES, state.states)
