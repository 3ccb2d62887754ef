"""Memory tiers in a step's cost: what stays on the device, and what moves, by arithmetic."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest

from moesaic.memory.memory_plan import MemoryPlan
from moesaic.memory.tier import Tier
from moesaic.parallel.partial_forward import BlockRange
from moesaic.parallel.pipeline_schedules import StagePass
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


@dataclass(frozen=True, slots=True)
class StreamedUnits:
    """Bytes of the weights that a tier of parameters takes, by unit, of each stage of a rank."""

    stages: tuple[Mapping[str, int], ...]

    @staticmethod
    def of(units: Mapping[str, int], *, stages: Sequence[BlockRange]) -> "StreamedUnits":
        """Return the units of the blocks of each stage."""
        return StreamedUnits(
            tuple({n: size for n, size in units.items() if stage.holds(n)} for stage in stages)
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all units."""
        return sum(sum(units.values()) for units in self.stages)

    @property
    def most_in_use(self) -> int:
        """The most bytes of units on the device at once."""
        return max(map(most_streamed, self.stages), default=0)

    def fetched(self, passes: Iterable[StagePass], *, frozen: Collection[str] = ()) -> int:
        """Return the bytes of weights that a step fetches.

        Each pass fetches its stage, but for the block that the forward pass before it has left. No
        backward pass reaches ``frozen`` blocks, before which nothing is trained. It is the most: of
        the experts, those without rows are left out in backward.
        """
        blocks: list[dict[str, int]] = [{} for _ in self.stages]
        for found, units in zip(blocks, self.stages, strict=True):
            for name, size in units.items():
                found[_block_of(name)] = found.get(_block_of(name), 0) + size
        total, left = 0, ""
        for each in passes:
            stage = blocks[each.stage]
            needed = [b for b in stage if not (each.is_backward and b in frozen)]
            if each.is_backward:
                needed.reverse()
            total += sum(stage[block] for block in needed)
            if needed and needed[0] == left:  # any other has made it leave
                total -= stage[left]
            last = "" if each.is_backward or not needed else needed[-1]
            left = "" if last in frozen else last
        return total


def fetched_by_1f1b(
    units: Mapping[str, int], *, last: str, stages: int, micro_batches: int, share: float
) -> int:
    """Return the bytes that the first of some ``stages`` fetches, over its ``share`` of the units.

    It has its ``last`` block from the forward pass before in all but the last ``stages - 1``
    backward passes, and in as many forward passes at first if it has no other block.
    """
    whole, block = sum(units.values()), sum(s for n, s in units.items() if _block_of(n) == last)
    alone = len({_block_of(name) for name in units}) <= stages
    left = micro_batches - (stages - 1) * (not alone)
    return 2 * micro_batches * whole - round(left * block / share)


def most_streamed(units: Mapping[str, int]) -> int:
    """Return the most bytes of a stage's units at once: of a block, and of the next unit."""
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
        updated = state.updated.weights - (not memory.parameters.is_device) * state.updated.streamed
        leaving = 0 if memory.gradients.is_device else min(bound, -(-state.gradients // stages))
        away = 0 if memory.activations.is_device else min(bound, saved)
        weights = 0 if states.is_device else min(bound, -(-updated // stages))
        return CopyBuffers(leaving + away, leaving + weights + on_disk)


@dataclass(frozen=True, slots=True)
class PassBytes:
    """Bytes of the passes of a step.

    ``fetched`` are those of weights that a tier lends to all passes, ``saved`` those of the
    activations of a micro-batch that leave the device, and return if they are used. Of gradients,
    ranks sum ``summed``, and stages of a pipeline ``shared``.
    """

    micro_batches: int
    fetched: int
    saved: int
    summed: int
    shared: int = 0


def moved_bytes(state: StateBytes, memory: MemoryPlan, passes: PassBytes) -> tuple[MovedBytes, ...]:
    """Return what moves between tiers in a step.

    Elementwise rules update on the host what has states there, other rules on the device.
    """
    sums: Counter[tuple[str, str, Purpose]] = Counter()
    sums[tier_name(memory.parameters), DEVICE, Purpose.WEIGHTS] += passes.fetched
    tier = tier_name(memory.activations)
    sums[DEVICE, tier, Purpose.ACTIVATIONS] += passes.micro_batches * passes.saved
    sums[tier, DEVICE, Purpose.ACTIVATIONS] += passes.micro_batches * passes.saved
    moves = (
        *_moved_gradients(state, memory, passes),
        *_moved_weights(state, memory),
        *_moved_states(state, memory),
    )
    for each in moves:
        sums[each.source, each.target, each.purpose] += each.bytes
    return tuple(
        MovedBytes(source, target, purpose, size)
        for (source, target, purpose), size in sums.items()
        if size and source != target
    )


def _moved_weights(state: StateBytes, memory: MemoryPlan) -> Iterator[MovedBytes]:
    """Yield the moves of weights that are updated elsewhere than where they rest."""
    tier = tier_name(memory.parameters)
    at = DEVICE if memory.optimizer_states.is_device else HOST
    for place, updated in ((at, state.updated - state.by_matrix), (DEVICE, state.by_matrix)):
        streamed = updated.streamed if tier != DEVICE else 0
        for rests, size in ((tier, streamed), (DEVICE, updated.weights - streamed)):
            yield MovedBytes(rests, place, Purpose.WEIGHTS, size * state.reads_weights)
            yield MovedBytes(place, rests, Purpose.WEIGHTS, size)


def _moved_states(state: StateBytes, memory: MemoryPlan) -> Iterator[MovedBytes]:
    """Yield the moves of states to where they are updated, and back."""
    tier = tier_name(memory.optimizer_states)
    on_host = state.stored - state.by_matrix.states
    for place, size in ((HOST, on_host), (DEVICE, state.by_matrix.states)):
        if tier != DEVICE:
            yield MovedBytes(tier, place, Purpose.STATES, size)
            yield MovedBytes(place, tier, Purpose.STATES, size)


def _moved_gradients(
    state: StateBytes, memory: MemoryPlan, passes: PassBytes
) -> Iterator[MovedBytes]:
    """Yield the moves of gradients.

    They leave in each micro-batch, or once, and are added on the host; a sum over ranks brings them
    to the device twice and back once, one over stages once and back; the update reads them where it
    computes.
    """
    size, gradients, tier = state.gradients, Purpose.GRADIENTS, tier_name(memory.gradients)
    at = DEVICE if memory.optimizer_states.is_device else HOST
    summed, shared = passes.summed, passes.shared
    left = size + (passes.micro_batches - 1) * (size - state.summed_once)
    if tier != DEVICE:
        yield MovedBytes(DEVICE, HOST, gradients, left + summed + shared)
        yield MovedBytes(HOST, DEVICE, gradients, 2 * summed + shared)
    if tier == DISK:
        yield MovedBytes(DISK, HOST, gradients, left - size + 2 * summed + shared)
        yield MovedBytes(HOST, DISK, gradients, left + summed + shared)
    yield MovedBytes(tier, at, gradients, size - state.by_matrix.gradients)
    yield MovedBytes(tier, DEVICE, gradients, state.by_matrix.gradients)
