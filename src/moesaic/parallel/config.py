"""Parallel config: the degrees of parallelism of a run and the method of each."""

from moesaic.core.config import Config
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.model.config import ModelConfig
from moesaic.parallel.activation_checkpointing import (
    ActivationCheckpointing,
    NoActivationCheckpointing,
)
from moesaic.parallel.batch_ranks import CapacityScope, GlobalBatch
from moesaic.parallel.context_parallel import ContextParallel, Ulysses
from moesaic.parallel.expert_dispatch import AllToAll, ExpertDispatch
from moesaic.parallel.pipeline_schedules import OneForwardOneBackward, PipelineSchedule
from moesaic.parallel.pipeline_stages import BalancedSplit, PipelineSplit, PipelineStages


class ParallelConfig(Config):
    """Degrees of parallelism (``plan``) and methods. The default is plain data parallelism.

    ``context_parallel`` applies where ``plan.context`` is above 1, ``dispatch`` where
    ``plan.expert`` or ``plan.expert_tensor`` is, ``pipeline_schedule`` and ``pipeline_split`` where
    ``plan.pipe`` is. ``capacity_scope`` selects the tokens that compete for expert capacity, and
    ``activation_checkpointing`` the blocks whose activations are recomputed in backward. ``memory``
    is the memory tier of parameters, gradients, optimizer states and activations.
    """

    plan: ParallelPlan = ParallelPlan()
    context_parallel: ContextParallel = Ulysses()
    dispatch: ExpertDispatch = AllToAll()
    capacity_scope: CapacityScope = GlobalBatch()
    pipeline_schedule: PipelineSchedule = OneForwardOneBackward()
    pipeline_split: PipelineSplit = BalancedSplit()
    activation_checkpointing: ActivationCheckpointing = NoActivationCheckpointing()
    memory: MemoryPlan = MemoryPlan()

    @property
    def acronym(self) -> str:
        """The combination in the notation of 2109.10465, of a plan that is resolved.

        E+Z-Offload+M is E+Z+M with gradients or optimizer states away from the device.
        """
        return self.plan.acronym(zero="Z-Offload" if self.memory.offloads else "Z")

    def pipeline_stages(self, config: ModelConfig) -> PipelineStages:
        """Return the pipeline stages of a model under this plan."""
        return PipelineStages.of(
            config, schedule=self.pipeline_schedule, ranks=self.plan.pipe, split=self.pipeline_split
        )
