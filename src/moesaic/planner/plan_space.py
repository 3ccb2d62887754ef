"""Plan space: every plan that a search considers, as degrees and as options of each.

``Degrees`` are the sizes of the axes and of a micro-batch; an ``Option`` adds the ZeRO stage, the
memory tiers and activation checkpointing. A plan is one of each.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from pydantic import Field

from moesaic.core.config import Config
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.memory.tier import DiskStorage, HostMemory
from moesaic.model.config import ModelConfig
from moesaic.model.parameter_flop_count import BatchDims
from moesaic.moe.config import MoE
from moesaic.parallel.activation_checkpointing import (
    ActivationCheckpointing,
    CheckpointBlocks,
    NoActivationCheckpointing,
)
from moesaic.parallel.config import ParallelConfig

RESIDENT = MemoryPlan()
STATES_ON_HOST = MemoryPlan(optimizer_states=HostMemory())
GRADIENTS_ON_HOST = MemoryPlan(optimizer_states=HostMemory(), gradients=HostMemory())
STATES_ON_DISK = MemoryPlan(optimizer_states=DiskStorage(), gradients=HostMemory())
STREAMED = MemoryPlan(
    optimizer_states=HostMemory(), gradients=HostMemory(), parameters=HostMemory()
)
WEIGHTS_AND_STATES_ON_HOST = MemoryPlan(
    optimizer_states=HostMemory(), parameters=HostMemory()
)  # gradients of many micro-batches add up on the device
STREAMED_STATES_ON_DISK = STREAMED.replace(optimizer_states=DiskStorage())
MEMORY_PLANS = (
    RESIDENT,
    STATES_ON_HOST,
    GRADIENTS_ON_HOST,
    STATES_ON_DISK,
    WEIGHTS_AND_STATES_ON_HOST,
    STREAMED,
    STREAMED_STATES_ON_DISK,
)


class Degrees(NamedTuple):
    """The sizes of the axes, the rows of a micro-batch, and the number of micro-batches."""

    pipe: int
    data: int
    context: int
    tensor: int
    expert: int
    expert_tensor: int
    rows: int
    micro_batches: int


@lru_cache(maxsize=64)  # a search asks for one plan for many options
def plan_of(axes: tuple[int, ...], *, zero: Literal[0, 1, 2, 3] = 0) -> ParallelPlan:
    """Return the plan of the first six ``Degrees``."""
    pipe, data, context, tensor, expert, expert_tensor = axes
    return ParallelPlan(
        pipe=pipe,
        data=data,
        context=context,
        tensor=tensor,
        expert=expert,
        expert_tensor=expert_tensor,
        zero=zero,
    )


@dataclass(frozen=True, slots=True)
class Option:
    """What a plan adds to its degrees."""

    zero: Literal[0, 1, 2, 3]
    memory: MemoryPlan
    checkpointing: ActivationCheckpointing

    @property
    def recomputes(self) -> bool:
        """Whether forward runs again in backward."""
        return not isinstance(self.checkpointing, NoActivationCheckpointing)


@dataclass(frozen=True, slots=True)
class CompletePlan:
    """One plan of the space."""

    degrees: Degrees
    option: Option

    @property
    def plan(self) -> ParallelPlan:
        """The degrees of parallelism, with ZeRO's stage."""
        return plan_of(self.degrees[:6], zero=self.option.zero)

    def parallel_config(self, base: ParallelConfig) -> ParallelConfig:
        """Return the config of a run with this plan, its methods those of ``base``."""
        return base.replace(
            plan=self.plan,
            memory=self.option.memory,
            activation_checkpointing=self.option.checkpointing,
        )


class PlanSpace(Config):
    """The plans of ``ranks`` devices for steps of ``rows`` rows of source and target tokens.

    All plans train on the same rows in a step. ``folded`` False ties the experts' tensor degree to
    that of the dense layers and their ranks to those of the data axis, as before MoE Parallel
    Folding (2504.14960): context ranks, too, then multiply the devices of a replica.
    """

    ranks: int = Field(ge=1)
    rows: int = Field(ge=1)
    source: int = Field(default=0, ge=0)
    target: int = Field(ge=1)
    max_pipe: int = Field(default=64, ge=1)
    max_tensor: int = Field(default=8, ge=1)
    max_context: int = Field(default=16, ge=1)
    max_micro_rows: int = Field(default=64, ge=1)
    zero: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
    memory: tuple[MemoryPlan, ...] = MEMORY_PLANS
    checkpointing: tuple[ActivationCheckpointing, ...] = (
        NoActivationCheckpointing(),
        CheckpointBlocks(),
    )
    folded: bool = True

    def micro_batch(self, rows: int) -> BatchDims:
        """Return the sizes of a micro-batch of so many rows."""
        return BatchDims(rows=rows, source=self.source, target=self.target)

    def options(self) -> tuple[Option, ...]:
        """Return every combination of ZeRO stage, memory plan and checkpointing."""
        return tuple(
            Option(zero, memory, checkpointing)
            for zero in self.zero
            for memory in self.memory
            for checkpointing in self.checkpointing
        )

    def degrees(self, model: ModelConfig) -> Iterator[Degrees]:
        """Yield the degrees that the numbers of ranks, layers, rows and tokens allow."""
        layers = max(model.encoder.layers, model.decoder.layers)
        experts = expert_numbers(model)
        for pipe in _divisors(self.ranks, at_most=min(self.max_pipe, layers)):
            for data, context, tensor in self._dense_degrees(self.ranks // pipe):
                yield from self._with_experts(pipe, data, context, tensor, experts)

    def _dense_degrees(self, stage: int) -> Iterator[tuple[int, int, int]]:
        for tensor in _divisors(stage, at_most=self.max_tensor):
            for context in _divisors(stage // tensor, at_most=self.max_context):
                if self._divides_tokens(context * tensor):
                    yield stage // tensor // context, context, tensor

    def _with_experts(
        self, pipe: int, data: int, context: int, tensor: int, experts: tuple[int, ...]
    ) -> Iterator[Degrees]:
        for expert, slices in self._expert_degrees(data, context, tensor, experts):
            for rows in _divisors(self.rows, at_most=self.max_micro_rows):
                micro_batches, rest = divmod(self.rows, data * rows)
                if micro_batches and not rest and (pipe == 1 or micro_batches >= pipe):
                    yield Degrees(pipe, data, context, tensor, expert, slices, rows, micro_batches)

    def _expert_degrees(
        self, data: int, context: int, tensor: int, experts: tuple[int, ...]
    ) -> Iterator[tuple[int, int]]:
        if not experts:
            yield 1, 1
            return
        for expert in _divisors(math.lcm(*experts), at_most=max(experts)):
            stage = data * context * tensor
            for expert_tensor in _divisors(stage, at_most=8) if self.folded else (tensor,):
                ranks = stage // expert_tensor if self.folded else data
                if ranks % expert == 0:
                    yield expert, expert_tensor

    def _divides_tokens(self, shards: int) -> bool:
        """Whether a row of any micro-batch divides evenly over context and tensor ranks."""
        return self.source % shards == 0 and self.target % shards == 0


def expert_numbers(model: ModelConfig) -> tuple[int, ...]:
    """Return the different numbers of experts of a model's MoE layers, the least first."""
    stacks = (model.encoder, model.decoder)
    found = {
        moe.experts
        for stack in stacks
        for layer in range(stack.layers)
        if isinstance(moe := model.moe_of_layer(stack, layer=layer), MoE)
    }
    return tuple(sorted(found))


def _divisors(number: int, *, at_most: int) -> tuple[int, ...]:
    return tuple(n for n in range(1, min(number, at_most) + 1) if number % n == 0)
