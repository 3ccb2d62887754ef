"""Parallel: how a run is laid over its ranks, as one part of its config."""

from moesaic.core.config import Choice, Config
from moesaic.dist.collectives import Group
from moesaic.dist.plan import ParallelPlan
from moesaic.model.blueprint import ModelConfig
from moesaic.nn.looking import AttentionBackend
from moesaic.parallel.deal import Cut as StreamCut
from moesaic.parallel.deal import in_order, zigzag
from moesaic.parallel.journey import Journey, Straight
from moesaic.parallel.ranks import Room, WholeBatch
from moesaic.parallel.recompute import KeepAll, Recompute
from moesaic.parallel.ring import Ring
from moesaic.parallel.schedules import OneForwardOneBackward, PipeSchedule
from moesaic.parallel.stages import ByCost, Cut, Stages
from moesaic.parallel.ulysses import Ulysses


class Reach(Choice):
    """Family: how tokens look at those of their row that other ranks hold (context parallelism)."""

    def cut(self) -> StreamCut:
        """Return how a stream is cut into parts."""
        return in_order

    def build(self, group: Group, *, groups: int) -> AttentionBackend:
        """Return the part of an attention with so many key/value heads on this rank."""
        raise NotImplementedError

    def problems(self, *, heads: int, ranks: int) -> str | None:
        """Return why so many ranks cannot share an attention of ``heads`` heads, if they cannot."""
        del heads, ranks
        return None


class UlyssesReach(Reach):
    """Tokens are exchanged for heads: each rank sees whole rows, of some heads (2309.14509)."""

    def build(self, group: Group, *, groups: int) -> AttentionBackend:
        return Ulysses(group, groups=groups)

    def problems(self, *, heads: int, ranks: int) -> str | None:
        return Ulysses.problems(heads=heads, ranks=ranks)


class RingReach(Reach):
    """Keys and values go round (2310.01889); tokens are dealt from both ends of the stream.

    For more ranks than an attention has heads, and for rows whose keys are too many for one rank.
    """

    def cut(self) -> StreamCut:
        return zigzag

    def build(self, group: Group, *, groups: int) -> AttentionBackend:
        del groups
        return Ring(group)


class Parallel(Config):
    """``plan`` has the degrees. The default shares the data out over all ranks, and nothing else.

    ``reach`` is how attention crosses ranks where ``plan.context`` is above 1, ``journey`` how rows
    get to experts where ``plan.expert`` or ``plan.expert_tensor`` is; ``room`` says whose tokens
    compete where experts take a limited number. Where ``plan.pipe`` is above 1, ``stages`` says
    where blocks are cut and ``schedule`` in what order they work. ``recompute`` says which blocks
    make their activations again in backward.
    """

    plan: ParallelPlan = ParallelPlan()
    reach: Reach = UlyssesReach()
    journey: Journey = Straight()
    room: Room = WholeBatch()
    schedule: PipeSchedule = OneForwardOneBackward()
    stages: Cut = ByCost()
    recompute: Recompute = KeepAll()

    def staged(self, config: ModelConfig) -> Stages:
        """Return how the blocks of a model lie over the ranks of a pipeline."""
        return Stages.of(config, schedule=self.schedule, ranks=self.plan.pipe, cut=self.stages)
