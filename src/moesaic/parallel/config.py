"""Parallel: how a run is laid over its ranks, as one part of its config."""

from moesaic.core.config import Choice, Config
from moesaic.dist.collectives import Group
from moesaic.dist.plan import ParallelPlan
from moesaic.model.config import ModelConfig
from moesaic.nn.looking import AttentionBackend
from moesaic.parallel.deal import TokenSplit as StreamCut
from moesaic.parallel.deal import contiguous_split, zigzag_split
from moesaic.parallel.journey import ExpertDispatch, AllToAll
from moesaic.parallel.ranks import CapacityScope, GlobalBatch
from moesaic.parallel.recompute import NoCheckpointing, ActivationCheckpointing
from moesaic.parallel.ring import RingAttention
from moesaic.parallel.schedules import OneForwardOneBackward, PipelineSchedule
from moesaic.parallel.stages import BalancedSplit, PipelineSplit, PipelineStages
from moesaic.parallel.ulysses import UlyssesAttention


class ContextParallel(Choice):
    """Family: how tokens look at those of their row that other ranks hold (context parallelism)."""

    def token_split(self) -> StreamCut:
        """Return how a stream is cut into parts."""
        return contiguous_split

    def build(self, group: Group, *, kv_heads: int) -> AttentionBackend:
        """Return the part of an attention with so many key/value heads on this rank."""
        raise NotImplementedError

    def problems(self, *, heads: int, ranks: int) -> str | None:
        """Return why so many ranks cannot share an attention of ``heads`` heads, if they cannot."""
        del heads, ranks
        return None


class Ulysses(ContextParallel):
    """Tokens are exchanged for heads: each rank sees whole rows, of some heads (2309.14509)."""

    def build(self, group: Group, *, kv_heads: int) -> AttentionBackend:
        return UlyssesAttention(group, kv_heads=kv_heads)

    def problems(self, *, heads: int, ranks: int) -> str | None:
        return UlyssesAttention.problems(heads=heads, ranks=ranks)


class Ring(ContextParallel):
    """Keys and values go round (2310.01889); tokens are dealt from both ends of the stream.

    For more ranks than an attention has heads, and for rows whose keys are too many for one rank.
    """

    def token_split(self) -> StreamCut:
        return zigzag_split

    def build(self, group: Group, *, kv_heads: int) -> AttentionBackend:
        del kv_heads
        return RingAttention(group)


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
        return PipelineStages.of(config, schedule=self.pipeline_schedule, ranks=self.plan.pipe, split=self.pipeline_split)
