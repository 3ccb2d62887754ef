"""Step cost, and its entries: operations, bytes held and bytes moved, each of one kind."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from moesaic.parallel.communication_volume import CommunicationVolume, summed_volumes
from moesaic.planner.operation_recorder import OperationKind

DEVICE, HOST, DISK = "DeviceMemory", "HostMemory", "DiskStorage"  # members of the family of tiers
TIER_WORDS = {DEVICE: "device", HOST: "host", DISK: "disk"}


class Purpose(StrEnum):
    """What bytes of a rank are for.

    ``GATHERED`` are the unsharded weights that ZeRO has beside its shards, ``ACTIVATIONS`` what
    autograd keeps from forward to backward, ``TRANSIENT`` all else at the peak: buffers of the
    operation that runs, gradients on their way. ``OVERWRITTEN`` are the old values of updates that
    run ahead of the gradient norm. Of each it is the most at once.
    """

    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    STATES = "states"
    OVERWRITTEN = "overwritten"
    GATHERED = "gathered"
    ACTIVATIONS = "activations"
    TRANSIENT = "transient"


class Phase(StrEnum):
    """Where in a step an operation runs; recomputed activations count as backward."""

    FORWARD = "forward"
    BACKWARD = "backward"
    UPDATE = "update"


@dataclass(frozen=True, slots=True)
class OperationCost:
    """``count`` equal operations of a rank in a step; FLOPs and bytes are those of one.

    ``dtype`` is that of the result.
    """

    phase: Phase
    kind: OperationKind
    dtype: str
    flops: int
    bytes_read: int
    bytes_written: int
    count: int


def gradient_operations(
    *, gradients: int, trained: int, buckets: Mapping[int, int]
) -> tuple[OperationCost, ...]:
    """Return what a rank does once a step with its gradients, after the backward passes.

    These are the copies into ``buckets`` (number by bytes) and back, the norms of ``trained``
    parameters' ``gradients`` in bytes, and their scaling, as in a step that clips.
    """
    memory = OperationKind.MEMORY
    found = [
        OperationCost(Phase.BACKWARD, memory, "float32", 0, size, size, 2 * number)
        for size, number in buckets.items()
    ]
    if trained:
        read = gradients // trained
        for written in (0, read):
            found.append(
                OperationCost(Phase.BACKWARD, memory, "float32", 0, read, written, trained)
            )
    return tuple(found)


def accumulation(*, gradients: int, trained: int, times: int) -> tuple[OperationCost, ...]:
    """Return the sums of ``trained`` parameters' ``gradients`` in bytes onto those there already.

    Each micro-batch of a step but the first makes them.
    """
    if not trained or not times:
        return ()
    size = gradients // trained
    memory = OperationKind.MEMORY
    return (OperationCost(Phase.BACKWARD, memory, "float32", 0, 2 * size, size, trained * times),)


def split_by_tokens(
    operations: Iterable[OperationCost], more: Iterable[OperationCost], *, times: int
) -> tuple[tuple[OperationCost, ...], tuple[OperationCost, ...]]:
    """Return the operations of a step that grow with its tokens, and those that do not.

    ``more`` are those of the same step with so many ``times`` the tokens. Gradients and copies of
    weights are as large there, and as many; where a result is computed in parts, parts are as
    large, but there are more. Products grow.
    """
    others = Counter[OperationCost]()
    for op in more:
        others[replace(op, count=1)] += op.count
    grow: list[OperationCost] = []
    fixed: list[OperationCost] = []
    for op in operations:
        there = others[replace(op, count=1)] if op.kind is OperationKind.MEMORY else 0
        parts = round((there - op.count) / (times - 1)) if there else op.count
        growing = min(op.count, max(0, parts))
        grow += [replace(op, count=growing)] if growing else []
        fixed += [replace(op, count=op.count - growing)] if growing < op.count else []
    return tuple(grow), tuple(fixed)


@dataclass(frozen=True, slots=True)
class HeldBytes:
    """Bytes that a rank has in a tier of memory for one purpose."""

    tier: str
    purpose: Purpose
    bytes: int


@dataclass(frozen=True, slots=True)
class MovedBytes:
    """Bytes that a rank moves between two tiers in a step, for one purpose."""

    source: str
    target: str
    purpose: Purpose
    bytes: int


@dataclass(frozen=True, slots=True)
class StepCost:
    """The cost of one training step (all micro-batches) for one rank.

    ``peak`` is the most bytes in each tier at once. ``operations`` are those of all micro-batches
    and of the update, ``gradient_operations`` between them (``cost_entries.gradient_operations``).
    ``synced`` is sent for gradients and ZeRO's weights, ``exchanged`` between layers and for the
    update. ``bubble`` is the share of a pipeline's time in which the rank waits for others (0
    without one).
    """

    held: tuple[HeldBytes, ...]
    peak: Mapping[str, int]
    operations: tuple[OperationCost, ...] = field(repr=False)
    exchanged: tuple[CommunicationVolume, ...]
    synced: tuple[CommunicationVolume, ...]
    moved: tuple[MovedBytes, ...]
    bubble: float = 0.0
    gradient_operations: tuple[OperationCost, ...] = field(default=(), repr=False)

    @property
    def sent(self) -> tuple[CommunicationVolume, ...]:
        """All that the rank sends, sorted by collective and axis."""
        return summed_volumes((*self.exchanged, *self.synced))

    def held_bytes(self, *, tier: str | None = None, purpose: Purpose | None = None) -> int:
        """Return the bytes of a tier, of a purpose, or of both."""
        return sum(
            each.bytes
            for each in self.held
            if tier in (None, each.tier) and purpose in (None, each.purpose)
        )

    def flops(self, *, kind: OperationKind | None = None, phase: Phase | None = None) -> int:
        """Return the FLOPs of a kind, of a phase, or of both."""
        return sum(
            each.flops * each.count
            for each in self.operations
            if kind in (None, each.kind) and phase in (None, each.phase)
        )
