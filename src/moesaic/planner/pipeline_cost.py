"""Pipeline cost: what a pipeline adds to a rank's step, by arithmetic on its schedule."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moesaic.distributed.communication_counter import SentCall
from moesaic.parallel.parameter_inventory import RankParameters
from moesaic.parallel.partial_forward import BlockRange
from moesaic.parallel.pipeline_schedules import StagePass
from moesaic.parallel.stage_serializer import LocalTokens, StageBoundary, StageSerializer
from moesaic.planner.cost_entries import Phase
from moesaic.planner.cost_settings import CostSettings
from moesaic.planner.measured_step import Span
from moesaic.planner.step_memory import kept_bytes, peak_bytes


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes of a micro-batch on a stage, beside what was there before a pass.

    ``kept`` stays from forward to backward, ``gradients`` after it; the peaks are those within the
    passes. ``sent`` are the stage's output and the gradient of its input, for other ranks.
    """

    kept: int
    gradients: int
    forward_peak: int
    backward_peak: int
    sent: int


@dataclass(frozen=True, slots=True)
class PipelineCost:
    """The stages of a rank in a pipeline; without one, the model is its only stage."""

    parameters: RankParameters
    settings: CostSettings

    @property
    def stage_numbers(self) -> tuple[int, ...]:
        """The stages of the rank."""
        stages = self.parameters.stages
        return (0,) if stages is None else stages.stages_of_rank(self.parameters.pipe_rank)

    @property
    def block_ranges(self) -> list[BlockRange]:
        """The blocks of each stage of the rank."""
        stages = self.parameters.stages
        if stages is None:
            return [BlockRange.all_blocks(self.settings.model)]
        return stages.ranges_of_rank(self.parameters.pipe_rank)

    def passes(self) -> tuple[StagePass, ...]:
        """Return the rank's passes in their order."""
        if self.parameters.stages is None:
            pair = (StagePass(0, is_backward=False), StagePass(0, is_backward=True))
            return pair * self.settings.micro_batches
        schedule = self.settings.parallel.pipeline_schedule
        walk = schedule.passes if self._splits_backward else schedule.whole_passes
        return walk(
            ranks=self.parameters.plan.pipe,
            rank=self.parameters.pipe_rank,
            micro_batches=self.settings.micro_batches,
        )

    def stage_memory(self, stage: int, spans: Sequence[Span], *, gradients: int) -> StageMemory:
        """Return the bytes of a micro-batch on the rank's stage of this index.

        ``spans`` are those of its blocks in the whole model, where the gradient of the output is
        freed by the block that reads it; here it is in a buffer. A backward pass frees what the
        forward pass kept, though some of it was made, or is freed, in spans of other stages.
        """
        number = self.stage_numbers[stage]
        after = self._boundary_bytes(number) if number < self._last_stage else 0
        forward = [span for span in spans if span.phase is Phase.FORWARD]
        backward = [span for span in spans if span.phase is Phase.BACKWARD]
        backward[0] = backward[0].with_more(after)
        return StageMemory(
            kept=kept_bytes(spans),
            gradients=gradients,
            forward_peak=peak_bytes(forward),
            backward_peak=peak_bytes(backward),
            sent=sum(size for near, size in self._boundaries() if near == stage),
        )

    def peak(self, kinds: Sequence[Sequence[StageMemory]]) -> tuple[int, int]:
        """Return the most bytes at once of a step's passes, and the most kept for backward.

        ``kinds`` are the stages' bytes in each kind of measured micro-batch.
        """
        done: Counter[StagePass] = Counter()
        live = peak = kept = most_kept = 0
        schedule, last = self.settings.parallel.pipeline_schedule, self.settings.micro_batches - 1
        for each in self.passes():
            kind = len(kinds) - 1 if 0 < done[each] == last else min(done[each], 1)
            memory = kinds[kind][each.stage]
            done[each] += 1
            if each.is_backward:
                peak = max(peak, live + memory.backward_peak)
                live += memory.gradients - memory.kept + memory.sent * schedule.holds_sent
                kept -= memory.kept
            else:
                peak = max(peak, live + memory.forward_peak)
                live, kept = live + memory.kept, kept + memory.kept
                most_kept = max(most_kept, kept)
        return peak, most_kept

    def most_kept(self, sizes: Sequence[int]) -> int:
        """Return the most at once of what passes keep, given its bytes for each stage."""
        kept = most = 0
        for each in self.passes():
            kept += -sizes[each.stage] if each.is_backward else sizes[each.stage]
            most = max(most, kept)
        return most

    def bubble(self) -> float:
        """Return the share of the step in which the rank waits."""
        plan, schedule = self.parameters.plan, self.settings.parallel.pipeline_schedule
        return schedule.bubble(
            ranks=plan.pipe,
            micro_batches=self.settings.micro_batches,
            splits_backward=self._splits_backward,
        )

    def sends(self) -> Iterator[SentCall]:
        """Yield what the rank's stages send for a micro-batch: states on, gradients back."""
        yield from (SentCall("send", "pipe", size, size) for _, size in self._boundaries())

    def shared_gradients(self) -> int:
        """Return the bytes of gradients that several ranks of a pipeline sum."""
        itemsize = self.settings.precision.gradient_dtype.itemsize
        return itemsize * sum(
            math.prod(shard.shape)
            for shard in self.parameters.trained
            if len(self.parameters.holders(shard.parameter)) > 1
        )

    def buffers(self) -> int:
        """Return the bytes that are received into, one buffer for each micro-batch, kept."""
        return self.settings.micro_batches * sum(size for _, size in self._boundaries())

    @property
    def _splits_backward(self) -> bool:
        """Whether backward passes may be split: with weights on a tier they are not."""
        return self.settings.parallel.memory.parameters.is_device

    @property
    def _last_stage(self) -> int:
        stages = self.parameters.stages
        return 0 if stages is None else len(stages.block_ranges) - 1

    def _boundaries(self) -> Iterator[tuple[int, int]]:
        """Yield the index of a stage of the rank, and the bytes of its boundary to another rank."""
        stages = self.parameters.stages
        if stages is None:
            return
        for index, number in enumerate(self.stage_numbers):
            for first in (number - 1, number):
                inside = 0 <= first < self._last_stage
                if inside and len(set(stages.rank_of_stage[first : first + 2])) == 2:
                    yield index, self._boundary_bytes(first)

    def _boundary_bytes(self, number: int) -> int:
        """Return the bytes that stage ``number`` hands to the next one for a micro-batch."""
        stages, config = self.parameters.stages, self.settings.model
        if stages is None:
            return 0
        plan, sizes = self.parameters.plan, self.settings.sizes
        ranks = plan.context * plan.tensor
        tokens = LocalTokens(
            -(-sizes.rows * sizes.source // ranks), -(-sizes.rows * sizes.target // ranks)
        )
        serializer = StageSerializer.of(
            StageBoundary.after(stages.block_ranges[number], config=config),
            dim=config.dim,
            dtype=self.settings.precision.parameter_dtype,
            tokens=[tokens],
        )
        return sum(buffer.nbytes for buffer in serializer.empty_buffers("meta"))
