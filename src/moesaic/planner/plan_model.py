"""Plan model: time and bytes of any plan of a space by arithmetic on one measured step.

The ``reference`` is the cost of a step of one rank and one row, each kind of block run once on fake
tensors. A plan scales its operations by kind: products and attention with the tokens and with the
tensor degree, passes over gradients with the weights of the rank, the experts' products with the
rows that meet at one expert. What layers exchange is measured on two ranks of each axis and scaled
with their number; states are exact (``state_bytes.py``).

Letters: m micro-batches, s share of the reference's tokens on a rank.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from moesaic.core.errors import UserError
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.parallel.communication_volume import CommunicationVolume, routing_statistics_bytes
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.context_parallel import Ring
from moesaic.parallel.parameter_inventory import ParameterInventory
from moesaic.parallel.precision import Precision
from moesaic.planner.cost_entries import (
    DEVICE,
    HOST,
    OperationCost,
    Phase,
    Purpose,
    StepCost,
    accumulation,
    gradient_operations,
    split_by_tokens,
)
from moesaic.planner.machine import Machine
from moesaic.planner.operation_recorder import OperationKind
from moesaic.planner.plan_forecast import PlanForecast
from moesaic.planner.plan_space import (
    CompletePlan,
    Degrees,
    Option,
    PlanSpace,
    expert_numbers,
    plan_of,
)
from moesaic.planner.state_bytes import PlanKey, ShardBytes, ShardedState
from moesaic.planner.step_memory import StateBytes
from moesaic.planner.step_time import (
    GroupShape,
    StepTime,
    SyncSeconds,
    compute_seconds,
    group_shape,
    operation_rate,
    operation_seconds,
    overlapped,
    sent_seconds,
    shape_in,
    step_sums,
    sync_seconds,
    transfer_link,
    unfolded_expert_axes,
)
from moesaic.planner.tier_bytes import (
    CopyBuffers,
    PassBytes,
    fetched_by_1f1b,
    most_streamed,
    moved_bytes,
    tier_names,
)

MORE_ROWS = 5  # few operations are five times as large as another
_RECENT = 64  # degrees of which times are kept: the options of one degrees share them
EXCHANGES = ("tensor", "context", "expert", "expert_tensor")  # axes between layers


@dataclass(frozen=True)
class PlanModelSettings:
    """What a plan model is made of: the model's parameters and one measured step of it.

    ``more_rows`` are the operations of a step of ``MORE_ROWS`` rows: what is as large there does
    not grow with the tokens of a rank, but with its weights; without them, all grows with tokens.
    ``exchanges`` is what one of two ranks of an axis sends for a row that it holds; an axis that is
    not named has one rank in every plan.
    """

    inventory: ParameterInventory
    reference: StepCost
    exchanges: Mapping[str, tuple[CommunicationVolume, ...]]
    machine: Machine
    state: ShardedState
    precision: Precision
    base: ParallelConfig
    more_rows: tuple[OperationCost, ...] = ()


class PlanModel:
    """Forecasts the plans of a space."""

    def __init__(self, settings: PlanModelSettings, space: PlanSpace) -> None:
        self.settings, self.space = settings, space
        self._config = settings.inventory.config
        self._moe_layers = len(settings.inventory.expert_modules)
        stacks = self._config.encoder, self._config.decoder
        self._layers = max(stack.layers for stack in stacks)
        blocks = [(stack, layer) for stack in stacks for layer in range(stack.layers)]
        self._blocks = len(blocks)
        routed = (self._config.routed_moe_of_layer(stack, layer=layer) for stack, layer in blocks)
        self._routed = [moe for moe in routed if moe is not None]
        passes = [op for op in settings.reference.operations if op.phase != Phase.UPDATE]
        grow, fixed = split_by_tokens(passes, settings.more_rows, times=MORE_ROWS)
        self._lines = [*((op, False) for op in grow), *((op, True) for op in fixed)]
        update = [op for op in settings.reference.operations if op.phase == Phase.UPDATE]
        calls = sum(op.count for op in update if op.kind is OperationKind.MEMORY)
        self._update_calls = max(1, calls)
        self._saved = settings.reference.held_bytes(purpose=Purpose.ACTIVATIONS)
        itemsize = settings.precision.compute_dtype.itemsize  # a row of hidden states is so large:
        self._row_bytes = (space.source + space.target) * self._config.dim * itemsize
        self._num_experts = max(expert_numbers(self._config), default=1)
        machine, self.evaluations = settings.machine, 0
        self._has_neighbours = min(space.ranks, machine.devices_per_node.value) > 1
        self._factors = {
            kind: machine.compute_factor(kind, neighbours=self._has_neighbours)
            for kind in OperationKind
        }
        self._busy = machine.beside_busy_ranks() if self._has_neighbours else machine
        self._compute = lru_cache(maxsize=_RECENT)(self._compute_seconds)
        self._exchange_seconds = lru_cache(maxsize=_RECENT)(self._sum_exchanges)
        self._kind_seconds = lru_cache(maxsize=None)(self._compute_kind)
        self._weights = lru_cache(maxsize=None)(self._share_of_weights)
        self._is_legal = lru_cache(maxsize=None)(self._check)
        self._exchange_bytes = lru_cache(maxsize=None)(self._exchanges)
        self._shape = lru_cache(maxsize=None)(self._group)
        self._tiered = lru_cache(maxsize=None)(self._by_layer)
        self._resident = lru_cache(maxsize=None)(self._resident_weights)

    # --- bounds and forecasts -----------------------------------------------------------------

    def bound_seconds(self, degrees: Degrees, *, recomputes: bool = False) -> float:
        """Return a time that no option of these degrees is under: compute and exchanges alone.

        With ``recomputes``, no option with checkpointing. It is infinite where the model cannot be
        cut so.
        """
        if self._exchange_bytes(*degrees[2:6]) is None:
            return math.inf
        compute = sum(self._compute(degrees, recomputes).values())
        exchanges = sum(self._exchange_seconds(degrees).values())
        return (compute + exchanges) / (1 - _bubble(degrees))

    def held(self, degrees: Degrees, option: Option) -> dict[tuple[str, Purpose], int]:
        """Return the bytes that a rank holds under a plan."""
        state, memory = self._state(degrees, option), option.memory
        tiers, pipe = tier_names(memory), degrees.pipe
        held: Counter[tuple[str, Purpose]] = Counter()
        gathered = -(-state.gathered // (1 if option.zero == 3 else pipe))  # 3 gathers by unit
        if tiers["gradients"] != DEVICE:
            gathered += state.gradients // max(2, self._layers)
        resident = self._resident(state, pipe, streams=tiers["parameters"] != DEVICE)
        held[DEVICE, Purpose.WEIGHTS] += resident
        if tiers["parameters"] != DEVICE:
            held[tiers["parameters"], Purpose.WEIGHTS] += -(-state.streamed // pipe)
        held[tiers["gradients"], Purpose.GRADIENTS] += -(-state.gradients // pipe)
        held[tiers["optimizer_states"], Purpose.STATES] += -(-state.states // pipe)
        held[DEVICE, Purpose.GATHERED] += gathered
        inner, saved = self._activations(degrees, option)
        held[tiers["activations"], Purpose.ACTIVATIONS] += saved
        held[DEVICE, Purpose.TRANSIENT] += inner
        kind = self.settings.machine.device
        whole = self._tiered(state)
        copies = CopyBuffers.of(memory, whole, saved=saved, device=kind, stages=pipe)
        held[DEVICE, Purpose.TRANSIENT] += copies.device
        held[HOST, Purpose.TRANSIENT] += copies.host
        return {key: size for key, size in held.items() if size}

    def forecast(self, choice: CompletePlan) -> PlanForecast:
        """Return time and bytes of a plan."""
        self.evaluations += 1
        degrees, option = choice.degrees, choice.option
        state = self._state(degrees, option)
        compute, memory = dict(self._compute(degrees, option.recomputes)), OperationKind.MEMORY
        compute[memory] = compute.get(memory, 0.0) + self._gradient_seconds(degrees, option, state)
        time = StepTime(
            compute,
            self._waited_for(choice),
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

    def _compute_seconds(self, degrees: Degrees, recomputes: bool) -> Mapping[str, float]:  # noqa: FBT001
        often = degrees.micro_batches * self._share(degrees)
        tokens, weights = self._tokens(degrees), self._weights(*degrees[3:6])
        found: dict[str, float] = {}
        for kind in OperationKind:
            forward, backward = self._kind_seconds(kind, tokens, weights, degrees.expert)
            passes = forward * (1 + recomputes) + backward
            if passes:
                found[kind.value] = often * self._factors[kind] * passes
        return found

    def _compute_kind(
        self, kind: OperationKind, tokens: float, weights: float, experts: int
    ) -> tuple[float, float]:
        """Return the seconds of forward and of backward of one micro-batch of a kind."""
        found = {Phase.FORWARD: 0.0, Phase.BACKWARD: 0.0}
        local = max(1.0, self._num_experts / experts)
        for op, of_weights in self._lines:
            if op.kind is kind:
                rate, scale = operation_rate(self._busy, op), weights if of_weights else tokens
                seconds = operation_seconds(op, rate, scale=scale, local_experts=local)
                found[op.phase] += op.count * seconds
        return found[Phase.FORWARD], found[Phase.BACKWARD]

    def _share_of_weights(self, tensor: int, expert: int, expert_tensor: int) -> float:
        """Return the share of the model's weights that a rank computes with, ZeRO or not."""
        key = PlanKey(expert * expert_tensor, 1, tensor, expert, expert_tensor, 0)
        shards = self.settings.state.of_plan(key)
        return shards.values / self.settings.state.values

    def _gradient_seconds(self, degrees: Degrees, option: Option, state: ShardBytes) -> float:
        """Return the seconds of what a rank does with its gradients, once or in micro-batches."""
        buckets = {state.summed // state.buckets: state.buckets} if state.buckets else {}
        summed = self._state(degrees, replace(option, zero=0)) if option.zero < 2 else state
        times = (degrees.micro_batches - 1) * option.memory.gradients.is_device
        found = (
            *gradient_operations(gradients=state.gradients, trained=state.trained, buckets=buckets),
            *accumulation(gradients=summed.gradients, trained=state.trained, times=times),
        )
        seconds = sum(compute_seconds(found, machine=self._busy).values())
        return self._share(degrees) * self._factors[OperationKind.MEMORY] * seconds

    def _waited_for(self, choice: CompletePlan) -> Mapping[str, float]:
        """Return the seconds of the exchanges between layers, and of a step's sums of numbers."""
        found = dict(self._exchange_seconds(choice.degrees))
        for line in step_sums(choice.plan):
            name = f"{line.kind} {line.axis}"
            seconds = self._seconds_of(line, line.bytes, choice.degrees)
            found[name] = found.get(name, 0.0) + seconds
        return found

    def _sum_exchanges(self, degrees: Degrees) -> Mapping[str, float]:
        often = degrees.micro_batches * self._share(degrees)
        found: dict[str, float] = {}
        tokens = self._tokens(degrees)
        for line in self._exchange_bytes(*degrees[2:6]) or ():
            whole = replace(line, messages=round(often * line.messages))
            name, size = f"{line.kind} {line.axis}", often * tokens * line.bytes
            found[name] = self._seconds_of(whole, size, degrees)
        stage = math.prod(degrees[1:4])
        if self._routed and stage > 1:
            size = sum(routing_statistics_bytes(moe, ranks=stage) for moe in self._routed)
            messages = math.ceil(often * len(self._routed))
            line = CommunicationVolume("all-reduce", "stage", size, messages)
            found["all-reduce stage"] = self._seconds_of(line, often * size, degrees)
        if degrees.pipe > 1:
            size = 2 * degrees.micro_batches * tokens * self._row_bytes
            line = CommunicationVolume("send", "pipe", round(size), 2 * degrees.micro_batches)
            found["send pipe"] = self._seconds_of(line, size, degrees)
        return found

    def _seconds_of(self, line: CommunicationVolume, size: float, degrees: Degrees) -> float:
        shape = self._shape(line.axis, degrees[:6])
        return sent_seconds(
            replace(line, bytes=round(size)), shape=shape, machine=self.settings.machine
        )

    def _group(self, axis: str, axes: tuple[int, ...]) -> GroupShape:
        node, plan = int(self.settings.machine.devices_per_node.value), plan_of(axes)
        if axis.startswith("expert") and not self.space.folded:
            names = ("expert_data", "context") if axis == "expert_data" else (axis,)
            return shape_in(unfolded_expert_axes(plan), names, devices_per_node=node)
        return group_shape(plan, axis, devices_per_node=node)

    def _exchanges(
        self, context: int, tensor: int, expert: int, expert_tensor: int
    ) -> tuple[CommunicationVolume, ...] | None:
        """Return what a rank sends between layers for a row on it; None: it cannot be cut so.

        Tensor ranks send each token to all others; an all-to-all over context or expert ranks keeps
        1 / n. What was measured on two ranks is scaled so.
        """
        base = self.settings.base.context_parallel
        found: list[CommunicationVolume] = []
        for axis, ranks in zip(EXCHANGES, (tensor, context, expert, expert_tensor), strict=True):
            to_all = axis.endswith("tensor") or (axis == "context" and isinstance(base, Ring))
            factor = ranks - 1 if to_all else 2 * (ranks - 1) / ranks
            if ranks > 1 and axis not in self.settings.exchanges:
                return None
            for line in self.settings.exchanges.get(axis, ()) if ranks > 1 else ():
                found.append(replace(line, axis=axis, bytes=round(factor * line.bytes)))
        return tuple(found) if self._can_be_cut(context, tensor, expert, expert_tensor) else None

    def _can_be_cut(self, context: int, tensor: int, expert: int, expert_tensor: int) -> bool:
        """Whether the model's dense layers, and its experts, can be cut so."""
        dense = {"context": context, "tensor": tensor, "data": 1}
        ranks = expert * expert_tensor
        routed = {"expert": expert, "expert_tensor": expert_tensor, "data": ranks}
        return self._is_legal(*dense.items()) and self._is_legal(*routed.items())

    def _check(self, *degrees: tuple[str, int]) -> bool:
        plan = ParallelPlan().replace(**dict(degrees))
        try:
            parallel = self.settings.base.replace(plan=plan)
            self.settings.inventory.on_rank(parallel, world=plan.world_size)
            self.settings.inventory.check_states(self.settings.state.optimizer, plan=plan)
        except UserError:
            return False
        return True

    def _sync_seconds(self, degrees: Degrees, state: ShardBytes) -> SyncSeconds:
        share, total = self._share(degrees), SyncSeconds()
        for lines, often in ((state.synced_once, 1), (state.synced_often, degrees.micro_batches)):
            for each in lines:
                size = round(share * often * each.bytes)
                line = replace(each, bytes=size, messages=math.ceil(share * often * each.messages))
                shape = self._shape(each.axis, degrees[:6])
                total = total.plus(sync_seconds(line, shape=shape, machine=self.settings.machine))
        return total

    def _update(self, degrees: Degrees, option: Option, state: ShardBytes) -> float:
        size = self._share(degrees) * state.read_and_written
        if tier_names(option.memory)["optimizer_states"] == DEVICE:
            calls = self._share(degrees) * self._update_calls
            return calls * self._busy.memory.seconds(size / calls)
        return size / self.settings.machine.update.value

    def _transfers(self, degrees: Degrees, option: Option, state: ShardBytes) -> dict[str, float]:
        share, m, tiered = self._share(degrees), degrees.micro_batches, self._tiered(state)
        moved: Counter[tuple[str, str]] = Counter()
        last, pipe = f"stack.{self._blocks - 1}", degrees.pipe
        units = {} if option.memory.parameters.is_device else tiered.streamed
        fetched = fetched_by_1f1b(units, last=last, stages=pipe, micro_batches=m, share=share)
        saved = self._activations(degrees, option)[1]
        passes = PassBytes(m, fetched=fetched, saved=saved, summed=state.summed)
        for each in moved_bytes(tiered, option.memory, passes):
            moved[each.source, each.target] += each.bytes
        machine = self.settings.machine
        return {
            f"{source} to {target}": transfer_link(machine, source, target).seconds(size * share)
            for (source, target), size in moved.items()
        }

    # --- memory -------------------------------------------------------------------------------

    def _state(self, degrees: Degrees, option: Option) -> ShardBytes:
        _, data, context, tensor, expert, slices, _, _ = degrees
        key = PlanKey(data, context, tensor, expert, slices, option.zero)
        return self.settings.state.of_plan(key)

    def _by_layer(self, state: ShardBytes) -> StateBytes:
        """Return the bytes of a rank with those of layers, and of experts, taken as equal."""
        blocks, sparse = self._blocks, self._moe_layers
        streamed = {f"stack.{n}": (state.streamed - state.experts) // blocks for n in range(blocks)}
        for number in range(blocks - sparse, blocks):
            streamed[f"stack.{number}.experts"] = state.experts // sparse
        reads = self.settings.state.reads_weights
        updated = state.updated, state.by_matrix
        return StateBytes(state.weights, 0, streamed, *updated, reads, 0, state.summed_once)

    def _resident_weights(self, state: ShardBytes, stages: int, *, streams: bool) -> int:
        """Return the bytes of weights on the device: all, or what stays and the units in use."""
        in_use = most_streamed(self._tiered(state).streamed) if streams else 0
        return -(-(state.weights - streams * state.streamed) // stages) + in_use

    def _activations(self, degrees: Degrees, option: Option) -> tuple[int, int]:
        """Return activations of what runs, and those kept to backward by this rank's blocks.

        A first stage of a pipeline keeps as many micro-batches as there are stages.
        """
        whole = self._saved * self._tokens(degrees)
        flying = min(degrees.micro_batches, degrees.pipe) * self._share(degrees)
        block = round(whole / self._layers)
        if not option.recomputes:
            return 0, round(whole * flying)
        inputs = self._row_bytes * self._layers * self._tokens(degrees)
        return block, round(min(inputs, whole) * flying)


def _bubble(degrees: Degrees) -> float:
    """Return the share of a pipeline's time in which a rank waits (2006.09503)."""
    return (degrees.pipe - 1) / (degrees.micro_batches + degrees.pipe - 1)
