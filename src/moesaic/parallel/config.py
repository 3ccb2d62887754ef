"""Parallel: how a run is laid over its ranks, as one part of its config."""

from moesaic.core.config import Config
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.model.config import ModelConfig
from moesaic.parallel.activation_checkpointing import ActivationCheckpointing, NoCheckpointing
from moesaic.parallel.batch_ranks import CapacityScope, GlobalBatch
from moesaic.parallel.context_parallel import ContextParallel, Ulysses
from moesaic.parallel.expert_dispatch import AllToAll, ExpertDispatch
from moesaic.parallel.pipeline_schedules import OneForwardOneBackward, PipelineSchedule
from moesaic.parallel.pipeline_stages import BalancedSplit, PipelineSplit, PipelineStages


class ParallelConfig(Config):
    """``plan`` has the degrees. The default shares the data out over all ranks, and nothing else.

    ``reach`` is how attention crosses ranks where ``plan.context`` is above 1, ``journey`` how rows
    get to experts where ``plan.expert`` or ``plan.expert_tensor`` is; ``room`` says whose tokens
    compete where experts take a limited number. Where ``plan.pipe`` is above 1, ``stages`` says
    where blocks are cut and ``schedule`` in what order they work. ``recompute`` says which blocks
    make their activations again in backward.
    """

    plan: ParallelPlan = ParallelPlan()
    context_parallel: ContextParallel = Ulysses()
    dispatch: ExpertDispatch = AllToAll()
    capacity_scope: CapacityScope = GlobalBatch()
    pipeline_schedule: PipelineSchedule = OneForwardOneBackward()
    pipeline_split: PipelineSplit = BalancedSplit()
    activation_checkpointing: ActivationCheckpointing = NoCheckpointing()

    def pipeline_stages(self, config: ModelConfig) -> PipelineStages:
        """Return how the blocks of a model lie over the ranks of a pipeline."""
        return PipelineStages.of(
            config, schedule=self.pipeline_schedule, ranks=self.plan.pipe, split=self.pipeline_split
        )
