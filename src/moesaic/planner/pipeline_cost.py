"""Pipeline cost: what a pipeline adds to a rank's step, by arithmetic on its schedule."""

from collections.abc import Iterator
from dataclasses import dataclass

from moesaic.distributed.communication_counter import SentCall
from moesaic.parallel.parameter_inventory import RankParameters
from moesaic.parallel.partial_forward import BlockRange
from moesaic.parallel.stage_serializer import LocalTokens, StageBoundary, StageSerializer
from moesaic.planner.cost_settings import CostSettings


@dataclass(frozen=True, slots=True)
class PipelineCost:
    """The stages of a rank in a pipeline; without one, the model is its only stage."""

    parameters: RankParameters
    settings: CostSettings

    @property
    def block_ranges(self) -> list[BlockRange]:
        """The blocks of each stage of the rank."""
        stages = self.parameters.stages
        if stages is None:
            return [BlockRange.all_blocks(self.settings.model)]
        numbers = stages.stages_of_rank(self.parameters.pipe_rank)
        return [stages.block_ranges[number] for number in numbers]

    def in_flight(self, *, gradients: bool) -> tuple[int, ...]:
        """Return how many micro-batches each stage keeps the activations of at most.

        With ``gradients``: once there are some, so after the first backward pass.
        """
        plan, number = self.parameters.plan, self.settings.micro_batches
        if plan.pipe == 1:
            return (1,)
        most = self.settings.parallel.pipeline_schedule.in_flight(
            ranks=plan.pipe, rank=self.parameters.pipe_rank, micro_batches=number
        )
        return tuple(min(each, max(1, number - 1)) for each in most) if gradients else most

    def bubble(self) -> float:
        """Return the share of the step in which the rank waits."""
        plan, schedule = self.parameters.plan, self.settings.parallel.pipeline_schedule
        return schedule.bubble(ranks=plan.pipe, micro_batches=self.settings.micro_batches)

    def sends(self) -> Iterator[SentCall]:
        """Yield what the rank's stages send for a micro-batch: states on, gradients back."""
        yield from (SentCall("send", "pipe", size, size) for size in self._boundaries())

    def buffers(self) -> int:
        """Return the bytes that are received into, one buffer for each micro-batch, kept."""
        return self.settings.micro_batches * sum(self._boundaries())

    def _boundaries(self) -> Iterator[int]:
        """Yield the bytes of what is sent, or received, at each boundary to another rank."""
        stages, config = self.parameters.stages, self.settings.model
        if stages is None:
            return
        plan, sizes = self.parameters.plan, self.settings.sizes
        ranks = plan.context * plan.tensor
        tokens = LocalTokens(
            -(-sizes.rows * sizes.source // ranks), -(-sizes.rows * sizes.target // ranks)
        )
        owners, own = stages.rank_of_stage, self.parameters.pipe_rank
        for number, blocks in enumerate(stages.block_ranges[:-1]):
            sides = owners[number : number + 2]
            if sides[0] == sides[1] or own not in sides:
                continue
            serializer = StageSerializer.of(
                StageBoundary.after(blocks, config=config),
                dim=config.dim,
                dtype=self.settings.precision.parameter_dtype,
                tokens=[tokens],
            )
            yield sum(buffer.nbytes for buffer in serializer.empty_buffers("meta"))
