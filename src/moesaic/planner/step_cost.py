"""Step cost: what one rank holds, computes, sends and moves in one training step of a plan.

Weights, gradients and optimizer states are exact, by arithmetic on the shards of parameters. All
else is measured: each kind of block is run once on fake tensors (``measured_step.py``), and the
results are kept for the next plan that splits a block alike. The rest is arithmetic: over layers,
pipeline stages, micro-batches and ranks.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import chain

from moesaic.core.errors import ConfigError
from moesaic.distributed.communication_counter import RING_BYTES, SentCall
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.parallel.communication_volume import (
    CommunicationVolume,
    GradientBucket,
    gradient_buckets,
    gradient_communication,
    summed_volumes,
)
from moesaic.parallel.gradient_sums import IN_FLIGHT
from moesaic.parallel.parameter_inventory import RankParameters
from moesaic.planner.block_chain import BlockChain, ChainPlace
from moesaic.planner.cost_entries import (
    DEVICE,
    HOST,
    HeldBytes,
    OperationCost,
    Phase,
    Purpose,
    StepCost,
    gradient_operations,
)
from moesaic.planner.cost_settings import CostSettings
from moesaic.planner.dry_run import volumes
from moesaic.planner.inventory_cache import inventory_of
from moesaic.planner.measured_step import MeasuredPart, MeasuredStep, Span, smallest_plan
from moesaic.planner.operation_recorder import Operation, OperationKind
from moesaic.planner.owner_update import owner_communication, owner_operations
from moesaic.planner.pipeline_cost import PipelineCost
from moesaic.planner.step_memory import (
    StateBytes,
    bucket_copies,
    gathered_bytes,
    gradient_corrections,
    kept_bytes,
    peak_bytes,
    stage_gradients,
    stage_spans,
    state_bytes,
    with_offloaded_activations,
)
from moesaic.planner.tier_bytes import (
    CopyBuffers,
    PassBytes,
    StreamedUnits,
    moved_bytes,
    tier_name,
)


def step_cost(settings: CostSettings, *, rank: int = 0) -> StepCost:
    """Return the cost of a step of one rank. Raises ConfigError where the plan does not fit."""
    return _Composition.of(settings, rank=rank).cost()


def peak_memory(settings: CostSettings, *, rank: int = 0) -> Mapping[str, int]:
    """Return the ``peak`` of a step alone: with ZeRO, half the measuring."""
    return _Composition.of(settings, rank=rank).held()[1]


@dataclass(frozen=True)
class _Composition:
    """A step's settings, the shards of a rank, and the measured spans of its kinds of blocks.

    ``part`` is what is measured, and ``measured_parameters`` are the shards there.
    """

    settings: CostSettings
    parameters: RankParameters
    blocks: BlockChain
    part: MeasuredPart
    measured_parameters: RankParameters

    @staticmethod
    def of(settings: CostSettings, *, rank: int) -> "_Composition":
        """Measure what was not measured before."""
        parallel, trainable = settings.parallel, settings.trainable
        if found := list(trainable.parallel_problems(parallel.plan, memory=parallel.memory)):
            raise ConfigError(found)
        inventory = inventory_of(settings.model, trainable=trainable)
        parameters = inventory.on_rank(parallel, world=settings.world, rank=rank)
        inventory.check_states(settings.optimizer, plan=parameters.plan)
        counts = sorted(set(inventory.expert_modules.values()))
        small = smallest_plan(parameters.plan, expert_counts=counts)
        parallel = settings.parallel.replace(plan=small, memory=MemoryPlan())
        blocks = BlockChain.of(
            settings.model,
            checkpointing=parallel.activation_checkpointing,
            parameters=inventory.parameters,
        )
        part = MeasuredPart(
            settings.model,
            blocks,
            parallel,
            settings.sizes,
            settings.optimizer,
            settings.precision,
            settings.chunks,
            settings.trainable,
            settings.busiest_share,
            is_pipelined=parameters.stages is not None,
            offloads=not settings.parallel.memory.activations.is_device,
        )
        measured_parameters = inventory.on_rank(parallel, world=small.world_size)
        return _Composition(settings, parameters, blocks, part, measured_parameters)

    @cached_property
    def measured(self) -> MeasuredStep:
        """The spans of the step."""
        return self._measure(self.part)

    @cached_property
    def plain(self) -> MeasuredStep:
        """The spans without ZeRO, for operations, and what is sent for activations."""
        parallel, plan = self.part.parallel, self.part.parallel.plan
        without = parallel.replace(plan=plan.replace(zero=0))
        return self._measure(replace(self.part, parallel=without)) if plan.zero else self.measured

    def _measure(self, part: MeasuredPart) -> MeasuredStep:
        zero = self.part.parallel.plan.zero
        last = _kinds_of_micro_batches(self.settings.micro_batches, zero=zero)
        return _measure_once(_Keyed(repr(part), part, last))

    def held(self) -> tuple[tuple[HeldBytes, ...], Mapping[str, int]]:
        """Return the bytes by tier and purpose, and the most in each tier at once."""
        peak, kept = self._peak()
        gathered = gathered_bytes(
            self.parameters, itemsize=self.settings.precision.parameter_dtype.itemsize
        )
        if self.parameters.plan.zero in (1, 2):
            kept -= gathered
        lines = [*self._state_lines(), HeldBytes(DEVICE, Purpose.GATHERED, gathered)]
        lines.append(HeldBytes(DEVICE, Purpose.ACTIVATIONS, max(0, kept)))
        slots = [sum(s.slots for s in stage) for stage in self._spans(self.measured, micro_batch=0)]
        tier, away = tier_name(self._memory.activations), self._pipeline.most_kept(slots)
        lines.append(HeldBytes(tier, Purpose.ACTIVATIONS, away))
        known = sum(line.bytes for line in lines if line.tier == DEVICE)
        lines.append(HeldBytes(DEVICE, Purpose.TRANSIENT, max(0, peak - known)))
        peaks = {DEVICE: peak}
        for line in lines:
            if line.tier != DEVICE:
                peaks[line.tier] = peaks.get(line.tier, 0) + line.bytes
        return tuple(line for line in lines if line.bytes), peaks

    def _state_lines(self) -> Iterator[HeldBytes]:
        """Yield the bytes of weights, gradients and states, each in its tier."""
        state, memory = self._state, self._memory
        yield HeldBytes(DEVICE, Purpose.WEIGHTS, self._resident_weights)
        if not memory.parameters.is_device:
            streamed = sum(state.streamed.values())
            yield HeldBytes(tier_name(memory.parameters), Purpose.WEIGHTS, streamed)
        yield HeldBytes(tier_name(memory.gradients), Purpose.GRADIENTS, state.gradients)
        yield HeldBytes(tier_name(memory.optimizer_states), Purpose.STATES, state.stored)
        yield HeldBytes(DEVICE, Purpose.STATES, state.counters)
        yield HeldBytes(HOST, Purpose.OVERWRITTEN, min(memory.run_ahead_bytes, state.overwritten))
        yield HeldBytes(HOST, Purpose.TRANSIENT, self._copies.host)

    @property
    def _memory(self) -> MemoryPlan:
        return self.settings.parallel.memory

    def cost(self) -> StepCost:
        """Return the whole cost."""
        held, peak = self.held()
        return StepCost(
            held=held,
            peak=peak,
            operations=self._operations(),
            exchanged=self._exchanged(),
            synced=gradient_communication(
                self.parameters,
                precision=self.settings.precision,
                micro_batches=self.settings.micro_batches,
            ),
            moved=moved_bytes(
                self._state,
                self._memory,
                PassBytes(
                    self.settings.micro_batches,
                    fetched=self._fetched(),
                    saved=self._saved,
                    summed=sum(bucket.bytes for bucket in self._buckets),
                    shared=self._pipeline.shared_gradients(),
                ),
            ),
            bubble=self._pipeline.bubble(),
            gradient_operations=gradient_operations(
                gradients=self._state.gradients,
                trained=len(self.parameters.trained),
                buckets=Counter(bucket.bytes for bucket in self._buckets),
            ),
        )

    @property
    def _resident_weights(self) -> int:
        """The bytes of weights on the device: all, or what stays and the units in use."""
        return self._state.weights - self._streamed.num_bytes + self._streamed.most_in_use

    @property
    def _streamed(self) -> StreamedUnits:
        units = {} if self._memory.parameters.is_device else self._state.streamed
        return StreamedUnits.of(units, stages=self._pipeline.block_ranges)

    def _fetched(self) -> int:
        """Return the bytes of weights that a tier of parameters lends in a step."""
        spans = self.measured.micro_batches[0]
        reached = {span.place for span in spans if span.phase is Phase.BACKWARD}
        # later stages send gradients back in any case
        starts = self._pipeline.stage_numbers[0] == 0
        frozen = self.blocks.names_without(reached) if starts else ()
        return self._streamed.fetched(self._pipeline.passes(), frozen=frozen)

    @cached_property
    def _copies(self) -> CopyBuffers:
        kind = self.settings.device
        return CopyBuffers.of(self._memory, self._state, saved=self._saved, device=kind)

    @cached_property
    def _saved(self) -> int:
        spans = chain.from_iterable(self._spans(self.measured, micro_batch=0))
        return sum(span.saved for span in spans)

    @cached_property
    def _state(self) -> StateBytes:
        return state_bytes(self.parameters, self.settings)

    @cached_property
    def _buckets(self) -> Sequence[GradientBucket]:
        return gradient_buckets(self.parameters, precision=self.settings.precision)

    @cached_property
    def _pipeline(self) -> PipelineCost:
        return PipelineCost(self.parameters, self.settings)

    @property
    def _counts(self) -> list[int]:
        """How many micro-batches of the step each measured one stands for."""
        measured, number = len(self.measured.micro_batches), self.settings.micro_batches
        return [1, number - measured + 1, 1][:measured]

    def _spans(self, step: MeasuredStep, *, micro_batch: int) -> list[tuple[Span, ...]]:
        """Return the spans of a micro-batch on each stage of the rank."""
        more: Mapping[ChainPlace, int] = {}
        ends = (
            micro_batch in (0, len(step.micro_batches) - 1)
            if self.part.parallel.plan.zero
            else micro_batch == 0
        )
        if ends and step is self.measured:
            more = gradient_corrections(self.parameters, self.measured_parameters, self.settings)
        overlaps = self.parameters.stages is None
        if overlaps and micro_batch == len(step.micro_batches) - 1 and step is self.measured:
            copies = bucket_copies(self.parameters, self.settings)
            more = {place: more.get(place, 0) + copies.get(place, 0) for place in {*more, *copies}}
        spans = step.micro_batches[micro_batch]
        stages = [
            stage_spans(spans, chain=self.blocks, blocks=blocks, corrections=more)
            for blocks in self._pipeline.block_ranges
        ]
        if self._memory.activations.is_device:
            return stages
        return [with_offloaded_activations(stage) for stage in stages]

    def _peak(self) -> tuple[int, int]:
        """Return the most bytes of the device at once, and of activations kept there."""
        state, memory = self._state, self._memory
        fixed = self._resident_weights
        fixed += state.counters + state.stored * memory.optimizer_states.is_device
        fixed += self._pipeline.buffers()
        passes = self._passes_peak if self.parameters.stages is None else self._pipeline_peak
        peak, most_kept = passes()
        summed = sum(bucket.bytes for bucket in self._buckets[-IN_FLIGHT:])
        update_peak = max(self._update_peak(), summed)
        gradients = state.gradients * memory.gradients.is_device
        return fixed + max(peak + self._copies.device, gradients + update_peak), most_kept

    def _passes_peak(self) -> tuple[int, int]:
        """Return the most bytes of forward and backward beside what is there for good, and kept."""
        live = peak = most_kept = 0
        for number in range(len(self.measured.micro_batches)):
            (spans,) = self._spans(self.measured, micro_batch=number)
            peak = max(peak, live + peak_bytes(spans))
            live += sum(span.change for span in spans)
            most_kept = max(most_kept, kept_bytes(spans))
        return peak, most_kept

    def _pipeline_peak(self) -> tuple[int, int]:
        """Return what ``_passes_peak`` does, of a pipeline's schedule."""
        pipeline, kinds = self._pipeline, []
        for number in range(len(self.measured.micro_batches)):
            stages = self._spans(self.measured, micro_batch=number)
            left = [sum(span.change for span in spans) for spans in stages]
            if not self.parameters.plan.zero:
                every = stage_gradients(self.parameters, pipeline.block_ranges, self.settings)
                left = [size * (number == 0) for size in every]
            kinds.append(
                [
                    pipeline.stage_memory(index, spans, gradients=size)
                    for index, (spans, size) in enumerate(zip(stages, left, strict=True))
                ]
            )
        return pipeline.peak(kinds)

    def _update_peak(self) -> int:
        """Return the most bytes that the update has beside weights, gradients and states."""
        is_resident = self._memory.optimizer_states.is_device
        return self.measured.update.peak if is_resident else self._copies.in_update

    def _operations(self) -> tuple[OperationCost, ...]:
        found: Counter[tuple[Phase, Operation]] = Counter()
        for number, count in enumerate(self._counts):
            for span in chain.from_iterable(self._spans(self.plain, micro_batch=number)):
                for operation, times in span.operations.items():
                    found[span.phase, operation] += times * count
        for operation, times in self._update_operations():
            found[Phase.UPDATE, operation] += times
        return tuple(
            OperationCost(phase, o.kind, o.dtype, o.flops, o.bytes_read, o.bytes_written, count)
            for (phase, o), count in sorted(found.items())
        )

    def _update_operations(self) -> Iterator[tuple[Operation, int]]:
        """Yield the passes over the states, and the products of the rank's share of matrices.

        All passes together read and write the states once, in as many calls as were measured.
        """
        state, measured = self._state, self.measured.update.operations
        passes = sum(n for each, n in measured.items() if each.kind is OperationKind.MEMORY)
        run = sum(self.blocks.has_run(s.parameter.name) for s in self.measured_parameters.trained)
        calls = max(1, round(passes * len(self.parameters.trained) / max(1, run)))
        written = state.updated.weights + state.states
        read = written + state.gradients
        yield Operation(OperationKind.MEMORY, "float32", 0, read // calls, written // calls), calls
        yield from owner_operations(self.parameters, self.settings.optimizer)

    def _exchanged(self) -> tuple[CommunicationVolume, ...]:
        """Return what is sent for activations, as measured, and for the update, by arithmetic."""
        plan, calls = self.parameters.plan, Counter[SentCall]()
        data = plan.data or 1
        ranks = {"stage": plan.stage_size, "data": data, "data+context": data * plan.context}
        for number, count in enumerate(self._counts):
            for span in chain.from_iterable(self._spans(self.plain, micro_batch=number)):
                for call, times in span.sent.items():
                    scaled = call.axis in ranks and call.kind in RING_BYTES
                    calls[call.over(ranks[call.axis]) if scaled else call] += times * count
        for call in self._pipeline.sends():
            calls[call] += self.settings.micro_batches
        updates = owner_communication(self.parameters, self.settings.optimizer)
        return summed_volumes((*volumes(calls), *updates))


def _kinds_of_micro_batches(number: int, *, zero: int) -> tuple[bool, ...]:
    """Return whether each micro-batch to measure is the step's last: first, later, last ones."""
    if number == 1:
        return (True,)
    return (False, False, True) if zero and number > 2 else (False, True)


@dataclass(frozen=True, slots=True)
class _Keyed:
    """A part to measure, equal to another if its text is."""

    text: str
    part: MeasuredPart = field(compare=False)
    last: tuple[bool, ...] = ()


@lru_cache(maxsize=512)
def _measure_once(keyed: _Keyed) -> MeasuredStep:
    return keyed.part.measure(last=keyed.last)
