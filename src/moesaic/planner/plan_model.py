"""Plan model: time and bytes of any plan of a space by arithmetic on one measured step.

The ``reference`` is the cost of a step of one rank and one row, each kind of block run once on fake
tensors. A plan scales its operations by kind: products and attention with the tokens and with the
tensor degree, the experts' products with the rows that meet at one expert. Volumes of collectives
are those of ``parallel/communication_volume.py``; states are exact (``state_bytes.py``).

Letters: m micro-batches, s share of the reference's tokens on a rank.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from moesaic.core.errors import UserError
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.parallel.communication_volume import CommunicationVolume, communication_volume
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parameter_inventory import ParameterInventory
from moesaic.parallel.precision import Precision
from moesaic.planner.cost_entries import DEVICE, DISK, HOST, Phase, Purpose
from moesaic.planner.machine import Machine
from moesaic.planner.operation_recorder import OperationKind
from moesaic.planner.plan_space import CompletePlan, Degrees, Option, PlanSpace
from moesaic.planner.state_bytes import PlanKey, ShardedState, StateBytes
from moesaic.planner.step_cost import StepCost
from moesaic.planner.step_time import (
    GroupShape,
    StepTime,
    group_shape,
    operation_rates,
    overlapped,
    sent_seconds,
    transfer_link,
)

EXCHANGES = ("tensor", "context", "expert", "expert_tensor")  # axes between layers
UPDATE_BYTES = 28  # AdamW in float32, per value: reads weight, gradient, moments; writes three


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes of each tier that one rank may hold; a tier that is not named has none."""

    bytes: Mapping[str, float]

    def excess(self, held: Mapping[str, float]) -> tuple[float, str]:
        """Return the largest ratio of held to allowed bytes, and its tier."""
        ratios = ((b / max(1.0, self.bytes.get(tier, 0)), tier) for tier, b in held.items() if b)
        return max(ratios, default=(0.0, DEVICE))


@dataclass(frozen=True, slots=True)
class PlanForecast:
    """Seconds of a step, and bytes of a rank by (tier, purpose)."""

    choice: CompletePlan
    time: StepTime
    held: Mapping[tuple[str, Purpose], int]

    @property
    def by_tier(self) -> dict[str, int]:
        """Bytes of each tier."""
        return tier_sums(self.held)


def tier_sums(held: Mapping[tuple[str, Purpose], int]) -> dict[str, int]:
    """Return the bytes of each tier."""
    sums: Counter[str] = Counter()
    for (tier, _), size in held.items():
        sums[tier] += size
    return dict(sums)


@dataclass(frozen=True)
class PlanModelSettings:
    """What a plan model is made of: the model's parameters and one measured step of it."""

    inventory: ParameterInventory
    reference: StepCost
    machine: Machine
    state: ShardedState
    precision: Precision
    base: ParallelConfig


class PlanModel:
    """Forecasts the plans of a space."""

    def __init__(self, settings: PlanModelSettings, space: PlanSpace) -> None:
        self.settings, self.space = settings, space
        self._config = settings.inventory.config
        self._layers = max(self._config.encoder.layers, self._config.decoder.layers)
        self._rates = operation_rates(settings.machine, dtype=dtype_name(settings.precision))
        self._lines = [op for op in settings.reference.operations if op.phase is not Phase.UPDATE]
        self._saved = settings.reference.held_bytes(purpose=Purpose.ACTIVATIONS)
        self._dims = max(1, self._config.dim)
        self.evaluations = 0
        self._kind_seconds = lru_cache(maxsize=None)(self._compute_kind)
        self._volume_of = lru_cache(maxsize=None)(self._volume)
        self._exchange_bytes = lru_cache(maxsize=None)(self._exchanges)
        self._shape = lru_cache(maxsize=None)(self._group)

    # --- bounds and forecasts -----------------------------------------------------------------

    def bound_seconds(self, degrees: Degrees) -> float:
        """Return a time that no option of these degrees is under: compute and exchanges alone.

        It is infinite where the model cannot be cut so.
        """
        if self._exchange_bytes(*degrees[2:6]) is None:
            return math.inf
        compute = sum(self._compute(degrees, recomputes=False).values())
        exchanges = sum(self._exchange_seconds(degrees).values())
        return (compute + exchanges) / (1 - _bubble(degrees))

    def held(self, degrees: Degrees, option: Option) -> dict[tuple[str, Purpose], int]:
        """Return the bytes that a rank holds under a plan."""
        state, memory = self._state(degrees, option), option.memory
        tiers = tier_names(memory)
        pipe = degrees.pipe
        held: Counter[tuple[str, Purpose]] = Counter()
        gathered = state.gathered // pipe
        if tiers["parameters"] != DEVICE:  # two blocks at a time are on the device
            gathered += 2 * state.weights // max(2, self._layers)
        if tiers["gradients"] != DEVICE:
            gathered += state.gradients // max(2, self._layers)
        held[tiers["parameters"], Purpose.WEIGHTS] += -(-state.weights // pipe)
        held[tiers["gradients"], Purpose.GRADIENTS] += -(-state.gradients // pipe)
        held[tiers["optimizer_states"], Purpose.STATES] += -(-state.states // pipe)
        held[DEVICE, Purpose.GATHERED] += gathered
        inner, saved = self._activations(degrees, option)
        held[tiers["activations"], Purpose.ACTIVATIONS] += saved
        held[DEVICE, Purpose.TRANSIENT] += inner
        return {key: size for key, size in held.items() if size}

    def forecast(self, choice: CompletePlan) -> PlanForecast:
        """Return time and bytes of a plan."""
        self.evaluations += 1
        degrees, option = choice.degrees, choice.option
        state = self._state(degrees, option)
        time = StepTime(
            self._compute(degrees, recomputes=option.recomputes),
            self._exchange_seconds(degrees),
            self._transfers(degrees, option, state),
            update=self._update(degrees, option, state),
        )
        whole = overlapped(
            time,
            sync=self._sync_seconds(degrees, state),
            machine=self.settings.machine,
            bubble=_bubble(degrees),
        )
        return PlanForecast(CompletePlan(degrees, option), whole, self.held(degrees, option))

    # --- time ---------------------------------------------------------------------------------

    def _share(self, degrees: Degrees) -> float:
        """The share of the layers that the largest pipeline stage has."""
        return -(-self._layers // degrees.pipe) / self._layers

    def _tokens(self, degrees: Degrees) -> float:
        """Tokens of a micro-batch on a rank, as a share of the reference's."""
        return degrees.rows / (degrees.context * degrees.tensor)

    def _compute(self, degrees: Degrees, *, recomputes: bool) -> dict[str, float]:
        often = degrees.micro_batches * self._share(degrees)
        tokens, experts = self._tokens(degrees), degrees.expert
        found: dict[str, float] = {}
        for kind in OperationKind:
            forward, backward = self._kind_seconds(kind, tokens, experts)
            passes = forward * (1 + recomputes) + backward
            if passes:
                found[kind.value] = often * passes
        return found

    def _compute_kind(
        self, kind: OperationKind, tokens: float, experts: int
    ) -> tuple[float, float]:
        """Return the seconds of forward and of backward of one micro-batch of a kind."""
        found = {Phase.FORWARD: 0.0, Phase.BACKWARD: 0.0}
        rate = self._rates[kind]
        for op in self._lines:
            if op.kind is kind:
                count, scale = float(op.count), tokens
                if kind is OperationKind.GROUPED_PRODUCT:
                    # rows of the ranks of an expert group meet: fewer, larger products
                    scale, count = tokens * experts, max(1.0, op.count / experts)
                size = op.bytes_read + op.bytes_written
                work = size if rate is self.settings.machine.memory else op.flops
                found[op.phase] += count * rate.seconds(work * scale)
        return found[Phase.FORWARD], found[Phase.BACKWARD]

    def _exchange_seconds(self, degrees: Degrees) -> dict[str, float]:
        often = degrees.micro_batches * self._share(degrees)
        found: dict[str, float] = {}
        for line in self._exchange_bytes(*degrees[2:6]) or ():
            size = often * line.bytes * degrees.rows
            found[f"{line.kind} {line.axis}"] = self._seconds_of(line, size, degrees)
        if degrees.pipe > 1:
            row = (
                (self.space.source + self.space.target)
                * self._dims
                * self.settings.precision.compute_dtype.itemsize
            )
            rows = degrees.rows / (degrees.context * degrees.tensor)
            size = 2 * degrees.micro_batches * rows * row
            line = CommunicationVolume("send", "pipe", round(size))
            found["send pipe"] = self._seconds_of(line, size, degrees)
        return found

    def _seconds_of(self, line: CommunicationVolume, size: float, degrees: Degrees) -> float:
        shape = self._shape(line.axis, degrees[:6])
        return sent_seconds(size, kind=line.kind, shape=shape, machine=self.settings.machine)

    def _group(self, axis: str, axes: tuple[int, ...]) -> GroupShape:
        pipe, *stage = axes
        plan = PlanKey(*stage, zero=0).plan.replace(pipe=pipe)
        node = int(self.settings.machine.devices_per_node.value)
        return group_shape(plan, axis, devices_per_node=node)

    def _exchanges(
        self, context: int, tensor: int, expert: int, expert_tensor: int
    ) -> tuple[CommunicationVolume, ...] | None:
        """Return what a rank sends between layers for one row of the batch; tokens are linear.

        Dense layers and experts do not depend on each other, so each is asked for by itself. None
        where the model cannot be cut so.
        """
        try:
            dense = self._volume_of(context, tensor, 1, 1, EXCHANGES[:2])
            routed = self._volume_of(1, 1, expert, expert_tensor, EXCHANGES[2:])
        except UserError:
            return None
        share = context * tensor  # the rows that a rank dispatches are a share of its row
        experts = (replace(line, bytes=line.bytes // share) for line in routed)
        return (*dense, *experts)

    def _volume(
        self, context: int, tensor: int, expert: int, expert_tensor: int, axes: tuple[str, ...]
    ) -> tuple[CommunicationVolume, ...]:
        ranks = max(context * tensor, expert * expert_tensor)
        plan = ParallelPlan(
            data=ranks // (context * tensor),
            context=context,
            tensor=tensor,
            expert=expert,
            expert_tensor=expert_tensor,
        )
        rank = self.settings.inventory.on_rank(self.settings.base.replace(plan=plan), world=ranks)
        sizes = self.space.micro_batch(1)
        one, two = (communication_volume(rank, sizes=sizes, micro_batches=n) for n in (1, 2))
        once = {(line.kind, line.axis): line.bytes for line in one}
        # what a second micro-batch adds: sums of gradients are sent once in a step
        found = (replace(x, bytes=x.bytes - once.get((x.kind, x.axis), 0)) for x in two)
        return tuple(line for line in found if line.axis in axes and line.bytes)

    def _sync_seconds(self, degrees: Degrees, state: StateBytes) -> float:
        share, total = self._share(degrees), 0.0
        for kind, axis, once, often in state.synced:
            size = share * (once + often * degrees.micro_batches)
            line = CommunicationVolume(kind, axis, round(size))
            total += self._seconds_of(line, size, degrees)
        return total

    def _update(self, degrees: Degrees, option: Option, state: StateBytes) -> float:
        size = UPDATE_BYTES * state.values * self._share(degrees)
        if tier_names(option.memory)["optimizer_states"] == DEVICE:
            return self.settings.machine.memory.seconds(size)
        return size / self.settings.machine.update.value

    def _transfers(self, degrees: Degrees, option: Option, state: StateBytes) -> dict[str, float]:
        share, m = self._share(degrees), degrees.micro_batches
        tiers = tier_names(option.memory)
        moved: Counter[tuple[str, str]] = Counter()
        home = tiers["optimizer_states"]
        if home != DEVICE:  # states are updated by the host: gradients go there, weights return
            moved[DEVICE, HOST] += state.gradients * (m if tiers["gradients"] != DEVICE else 1)
            moved[HOST, DEVICE] += state.weights
        if home == DISK:
            moved[DISK, HOST] += state.states
            moved[HOST, DISK] += state.states
        if tiers["parameters"] != DEVICE:
            moved[HOST, DEVICE] += state.weights * m * (2 + option.recomputes)
        if tiers["activations"] != DEVICE:
            kept = self._activations(degrees, option)[1] * m
            moved[DEVICE, HOST] += kept
            moved[HOST, DEVICE] += kept
        machine = self.settings.machine
        return {
            f"{source} to {target}": transfer_link(machine, source, target).seconds(size * share)
            for (source, target), size in moved.items()
        }

    # --- memory -------------------------------------------------------------------------------

    def _state(self, degrees: Degrees, option: Option) -> StateBytes:
        _, data, context, tensor, expert, slices, _, _ = degrees
        key = PlanKey(data, context, tensor, expert, slices, option.zero)
        return self.settings.state.of_plan(key)

    def _activations(self, degrees: Degrees, option: Option) -> tuple[int, int]:
        """Return activations of what runs, and those kept to backward by this rank's blocks.

        A first stage of a pipeline keeps as many micro-batches as there are stages.
        """
        whole = self._saved * self._tokens(degrees)
        flying = min(degrees.micro_batches, degrees.pipe) * self._share(degrees)
        block = round(whole / self._layers)
        if not option.recomputes:
            return 0, round(whole * flying)
        sizes = self.space.micro_batch(1)
        row = (
            (sizes.source + sizes.target)
            * self._dims
            * self.settings.precision.compute_dtype.itemsize
        )
        inputs = row * self._layers * self._tokens(degrees)
        return block, round(min(inputs, whole) * flying)


def dtype_name(precision: Precision) -> str:
    """Return the name of the dtype of matrix products, as in a machine file."""
    return str(precision.compute_dtype).removeprefix("torch.")


def tier_names(memory: MemoryPlan) -> dict[str, str]:
    """Return the name of the tier of each purpose."""
    return {
        "parameters": type(memory.parameters).__name__,
        "gradients": type(memory.gradients).__name__,
        "optimizer_states": type(memory.optimizer_states).__name__,
        "activations": type(memory.activations).__name__,
    }


def _bubble(degrees: Degrees) -> float:
    """Return the share of a pipeline's time in which a rank waits (2006.09503)."""
    return (degrees.pipe - 1) / (degrees.micro_batches + degrees.pipe - 1)
