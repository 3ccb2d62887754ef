"""Memory tiers in a step's cost: what stays on the device, and what moves, by arithmetic."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest

from moesaic.memory.memory_plan import MemoryPlan
from moesaic.memory.tier import Tier
from moesaic.planner.cost_entries import DEVICE, DISK, HOST, MovedBytes, Purpose
from moesaic.planner.step_memory import StateBytes


def tier_name(tier: Tier) -> str:
    """Return the name of a tier in a cost."""
    return type(tier).__name__


def tier_names(memory: MemoryPlan) -> dict[str, str]:
    """Return the name of the tier of each purpose."""
    return {
        "parameters": tier_name(memory.parameters),
        "gradients": tier_name(memory.gradients),
        "optimizer_states": tier_name(memory.optimizer_states),
        "activations": tier_name(memory.activations),
    }


def resident_weights(state: StateBytes, *, streams: bool, stages: int = 1) -> int:
    """Return the bytes of weights on the device: all, or what is not streamed and units in use.

    The weights of ``state`` are those of so many pipeline stages, each of which has units in use.
    """
    if not streams:
        return -(-state.weights // stages)
    stays = state.weights - sum(state.streamed.values())
    return -(-stays // stages) + most_streamed(state.streamed)


def most_streamed(units: Mapping[str, int]) -> int:
    """Return the most bytes of units at once: of a block, and of the unit that is fetched next."""
    return max(
        (sum(units[name] for name in each) for each in _held_at_once(tuple(units))), default=0
    )


@lru_cache
def _held_at_once(units: tuple[str, ...]) -> list[set[str]]:
    """Return which units are held at once, in forward and in backward.

    The search asks for the same units of thousands of plans.
    """
    blocks, held = _blocks(units), []
    for order in (blocks, blocks[::-1]):
        names = [name for block in order for name in block]
        for name, following in zip_longest(names, names[1:], fillvalue=""):
            held.append({_block_of(name), name, following} & set(units))
    return held


@lru_cache
def _blocks(units: tuple[str, ...]) -> list[list[str]]:
    """Return the units of each block: its own, then its experts."""
    found: dict[str, list[str]] = {}
    for name in units:
        found.setdefault(_block_of(name), []).append(name)
    return [sorted(names, key=len) for names in found.values()]


def _block_of(unit: str) -> str:
    return ".".join(unit.split(".")[:2])


@dataclass(frozen=True, slots=True)
class CopyBuffers:
    """The most bytes of copies under way: on the device, and in pinned buffers on the host.

    A CPU has only those of disks, ``in_update``.
    """

    device: int = 0
    host: int = 0
    in_update: int = 0

    @staticmethod
    def of(
        memory: MemoryPlan, state: StateBytes, *, saved: int, device: str, stages: int = 1
    ) -> "CopyBuffers":
        """Return those of a rank with a share of ``state`` and ``saved`` activations.

        Gradients leave through a ring of buffers, activations from copies on the device. Weights
        that are updated on the host, and states on disk, are in buffers there.
        """
        bound, states = memory.in_flight_bytes, memory.optimizer_states
        on_disk = (tier_name(states) == DISK) * min(bound, -(-state.stored // stages))
        if device == "cpu":
            return CopyBuffers(in_update=on_disk)
        updated = state.updated - (not memory.parameters.is_device) * state.updated_streamed
        leaving = 0 if memory.gradients.is_device else min(bound, -(-state.gradients // stages))
        away = 0 if memory.activations.is_device else min(bound, saved)
        weights = 0 if states.is_device else min(bound, -(-updated // stages))
        return CopyBuffers(leaving + away, leaving + weights + on_disk)


def moved_bytes(
    state: StateBytes,
    memory: MemoryPlan,
    *,
    micro_batches: int,
    summed: int,
    saved: int,
) -> Iterator[MovedBytes]:
    """Yield what moves between tiers in a step of an optimizer that updates on the host.

    Streamed weights are fetched for each forward pass and, but for the last block's, for each
    backward pass: at most, since experts without rows are left out there, and blocks before which
    nothing is trained. A pipeline, whose last block does not stay either, fetches more. Other
    weights go to the host to be updated, and return. ``summed`` are the bytes of gradients that
    ranks sum, ``saved`` those of the activations of a micro-batch that leave the device, and return
    if they are used.
    """
    streamed = 0 if memory.parameters.is_device else sum(state.streamed.values())
    if streamed:
        tier = tier_name(memory.parameters)
        last = sum(state.streamed[name] for name in _blocks(tuple(state.streamed))[-1])
        yield MovedBytes(tier, DEVICE, Purpose.WEIGHTS, micro_batches * (2 * streamed - last))
    if not memory.activations.is_device:
        tier = tier_name(memory.activations)
        yield MovedBytes(DEVICE, tier, Purpose.ACTIVATIONS, micro_batches * saved)
        yield MovedBytes(tier, DEVICE, Purpose.ACTIVATIONS, micro_batches * saved)
    if not memory.gradients.is_device:
        yield from _moved_gradients(state.gradients, memory, micro_batches, summed=summed)
    elif not memory.optimizer_states.is_device:
        yield MovedBytes(DEVICE, HOST, Purpose.GRADIENTS, state.gradients)
    if not memory.optimizer_states.is_device:
        updated = state.updated - (state.updated_streamed if streamed else 0)
        yield MovedBytes(DEVICE, HOST, Purpose.WEIGHTS, updated)
        yield MovedBytes(HOST, DEVICE, Purpose.WEIGHTS, updated)
    if tier_name(memory.optimizer_states) == DISK:
        yield MovedBytes(DISK, HOST, Purpose.STATES, state.stored)
        yield MovedBytes(HOST, DISK, Purpose.STATES, state.stored)


def _moved_gradients(
    size: int, memory: MemoryPlan, micro_batches: int, *, summed: int
) -> Iterator[MovedBytes]:
    """Yield the moves of ``size`` bytes of gradients.

    They leave in each micro-batch and are added on the host; a sum over ranks brings them to the
    device twice and back once; the update reads them on the host.
    """
    yield MovedBytes(DEVICE, HOST, Purpose.GRADIENTS, micro_batches * size + summed)
    if summed:
        yield MovedBytes(HOST, DEVICE, Purpose.GRADIENTS, 2 * summed)
    if tier_name(memory.gradients) == DISK:
        yield MovedBytes(DISK, HOST, Purpose.GRADIENTS, micro_batches * size + 2 * summed)
        yield MovedBytes(HOST, DISK, Purpose.GRADIENTS, micro_batches * size + summed)
