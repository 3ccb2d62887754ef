"""Step cost: what one rank holds, computes, sends and moves in one training step of a plan.

``CostSettings`` are what it depends on, ``step_cost`` computes it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from pydantic import Field

from moesaic.core.config import Config
from moesaic.model.config import ModelConfig
from moesaic.model.parameter_flop_count import BatchDims
from moesaic.optim.optimizer import AdamW, Optimizer
from moesaic.parallel.communication_volume import CommunicationVolume, communication_volume
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parameter_inventory import ParameterInventory
from moesaic.planner.dry_run import simulate_step

DEVICE, HOST, DISK = "DeviceMemory", "HostMemory", "DiskStorage"  # members of the family of tiers


class Purpose(StrEnum):
    """What bytes of a rank are for.

    ``GATHERED`` are the unsharded weights and gradients that ZeRO has beside its shards,
    ``ACTIVATIONS`` what autograd keeps from forward to backward, ``TRANSIENT`` the buffers of the
    operation that runs. Of each it is the most at once; not all of these instants are the same.
    """

    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    STATES = "states"
    GATHERED = "gathered"
    ACTIVATIONS = "activations"
    TRANSIENT = "transient"


class Phase(StrEnum):
    """Where in a step an operation runs; recomputed activations count as backward."""

    FORWARD = "forward"
    BACKWARD = "backward"
    UPDATE = "update"


class OperationKind(StrEnum):
    """What bounds an operation: products by their shapes, all others by memory."""

    DENSE_PRODUCT = "dense product"
    GROUPED_PRODUCT = "grouped product"
    ATTENTION = "attention"
    MEMORY = "memory-bound"


@dataclass(frozen=True, slots=True)
class OperationCost:
    """``count`` equal operations of a rank in a step; FLOPs and bytes are those of one."""

    phase: Phase
    kind: OperationKind
    flops: int
    bytes_read: int
    bytes_written: int
    count: int


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


class CostSettings(Config):
    """What the cost of a step depends on.

    ``sizes`` are those of one micro-batch of a data-parallel rank, ``world`` the number of ranks.
    ``busiest_share`` is the share of a layer's edges that the busiest expert has; None is even.
    """

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: Optimizer = AdamW()
    sizes: BatchDims
    micro_batches: int = Field(default=1, ge=1)
    world: int = Field(default=1, ge=1)
    busiest_share: float | None = Field(default=None, gt=0, le=1)


@dataclass(frozen=True, slots=True)
class StepCost:
    """The cost of one training step (all micro-batches) for one rank.

    ``peak`` is the most bytes in each tier at once. ``bubble`` is the share of a pipeline's time in
    which the rank waits for others (0 without one). ``parameters`` counts the whole model's.
    """

    parameters: int
    held: tuple[HeldBytes, ...]
    peak: Mapping[str, int]
    operations: tuple[OperationCost, ...]
    sent: tuple[CommunicationVolume, ...]
    moved: tuple[MovedBytes, ...]
    bubble: float = 0.0

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


def step_cost(settings: CostSettings, *, rank: int = 0) -> StepCost:
    """Return the cost of a step of one rank. Raises ConfigError where the plan does not fit."""
    done = simulate_step(
        settings.model,
        parallel=settings.parallel,
        world_size=settings.world,
        sizes=settings.sizes,
        rank=rank,
        optimizer=settings.optimizer,
    )
    parameters = ParameterInventory(settings.model).on_rank(
        settings.parallel, world=settings.world, rank=rank
    )
    held = {
        Purpose.WEIGHTS: done.weights,
        Purpose.GRADIENTS: done.gradients,
        Purpose.STATES: done.optimizer,
        Purpose.ACTIVATIONS: done.saved_activations,
    }
    return StepCost(
        parameters=sum(math.prod(s.parameter.placement.shape) for s in parameters.shards),
        held=tuple(HeldBytes(DEVICE, purpose, size) for purpose, size in held.items()),
        peak={DEVICE: done.peak + done.optimizer},
        operations=(),
        sent=communication_volume(
            parameters, sizes=settings.sizes, micro_batches=settings.micro_batches
        ),
        moved=(),
    )
