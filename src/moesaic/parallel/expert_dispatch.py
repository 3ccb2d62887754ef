"""Expert dispatch: how tokens are sent to experts on other ranks, as a part of a run's config."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch.distributed as distributed
from pydantic import Field

from moesaic.core.config import Choice
from moesaic.core.errors import ConfigError
from moesaic.distributed.parallel_plan import ParallelPlan, RankGrid
from moesaic.distributed.process_groups import Group, split_group
from moesaic.moe.adaptive_dispatcher import AdaptiveDispatcher, DispatchCosts, LinearCost
from moesaic.moe.all_to_all_dispatcher import AllToAllDispatcher, hierarchical_dispatcher
from moesaic.moe.chunked_dispatcher import ChunkedAllToAllDispatcher, OverlapDegrees
from moesaic.moe.dispatcher import Dispatcher
from moesaic.moe.experts import GroupedExperts
from moesaic.moe.layer import MoELayer

PositiveCount = Annotated[int, Field(ge=1)]
NonNegativeCost = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, slots=True)
class DispatchGroups:
    """Process groups of one MoE layer: its experts are split over ``expert``, each expert's hidden
    width over ``expert_tensor``. ``timeout_s`` is for groups that a dispatcher creates.
    """

    expert: Group
    expert_tensor: Group
    timeout_s: float


class ExpertDispatch(Choice):
    """Family: dispatch of tokens to experts on other ranks. Members differ in time and bytes only.

    ``shards_hidden``: works where the hidden width of experts is sharded (``expert_tensor``).
    """

    shards_hidden: ClassVar[bool] = True

    def build(self, groups: DispatchGroups) -> Dispatcher:
        """Return the dispatcher of one layer. Collective over both groups."""
        raise NotImplementedError

    def problems(self, layer: MoELayer, *, plan: ParallelPlan) -> str | None:
        """Return why it cannot serve a layer under a plan, or None."""
        if plan.expert_tensor == 1 or self.shards_hidden:
            return None
        kind = type(layer.experts).__name__
        return (
            f"it cannot send rows to slices of {kind}, and expert_tensor is {plan.expert_tensor}: "
            "set it to 1"
        )


class AllToAll(ExpertDispatch):
    """One all-to-all with one row for each edge (token, expert) (GShard, 2006.16668)."""

    def build(self, groups: DispatchGroups) -> Dispatcher:
        return AllToAllDispatcher(groups.expert, slice_group=groups.expert_tensor)


class HierarchicalAllToAll(ExpertDispatch):
    """Two all-to-alls: a token is sent to a node once for all its experts there, then within it."""

    shards_hidden = False
    ranks_per_node: PositiveCount

    def build(self, groups: DispatchGroups) -> Dispatcher:
        group = groups.expert
        ranks = [0] if group is None else distributed.get_process_group_ranks(group)
        if why := self._uneven_nodes(ranks):
            raise ConfigError([f"parallel.dispatch: {why}"])
        inner_size = self._ranks_on_first_node(ranks)
        nodes = split_group(group, inner_size=inner_size, timeout_s=groups.timeout_s)
        return hierarchical_dispatcher(inter_node=nodes.outer, intra_node=nodes.inner)

    def problems(self, layer: MoELayer, *, plan: ParallelPlan) -> str | None:
        axes = plan.axes(num_experts=layer.router.config.experts)
        reasons = map(self._uneven_nodes, RankGrid(axes).groups(("expert",)))
        return super().problems(layer, plan=plan) or next(filter(None, reasons), None)

    def _ranks_on_first_node(self, ranks: Sequence[int]) -> int:
        return sum(rank // self.ranks_per_node == ranks[0] // self.ranks_per_node for rank in ranks)

    def _uneven_nodes(self, ranks: Sequence[int]) -> str | None:
        """Return why ``ranks`` cannot use two all-to-alls: not equally many on every node."""
        each = self._ranks_on_first_node(ranks)
        nodes = [rank // self.ranks_per_node for rank in ranks]
        runs = [nodes[start : start + each] for start in range(0, len(nodes), each)]
        if all(len(run) == each and len(set(run)) == 1 for run in runs):
            return None
        return (
            f"ranks {list(ranks)} share a layer's experts and are on nodes {nodes}, of "
            f"{self.ranks_per_node} ranks each, but a hierarchical all-to-all needs equally many "
            "on every node; choose another parallel.expert, or AllToAll()"
        )


class ChunkedAllToAll(ExpertDispatch):
    """Experts compute one chunk of rows while the next is sent (2206.03382, 2501.10714).

    ``forward`` and ``backward`` are the numbers of chunks in each pass.
    """

    shards_hidden = False
    forward: PositiveCount = 2
    backward: PositiveCount = 2

    def build(self, groups: DispatchGroups) -> Dispatcher:
        degrees = OverlapDegrees(self.forward, self.backward)
        return ChunkedAllToAllDispatcher(groups.expert, degrees=degrees)


class AdaptiveExperts(ExpertDispatch):
    """Sends rows to experts or gathers expert weights, whichever costs less (Tutel, 2206.03382).

    Decided each step from the routed load and these costs in seconds: to start a collective, to
    send a byte of a row or of a weight, to compute one row. The default counts bytes.
    """

    start_s: NonNegativeCost = 0.0
    row_byte_s: NonNegativeCost = 1.0
    weight_byte_s: NonNegativeCost = 1.0
    work_row_s: NonNegativeCost = 0.0

    def build(self, groups: DispatchGroups) -> Dispatcher:
        costs = DispatchCosts(
            all_to_all=LinearCost(self.start_s, self.row_byte_s),
            gather_weights=LinearCost(self.start_s, self.weight_byte_s),
            compute=LinearCost(0.0, self.work_row_s),
        )
        return AdaptiveDispatcher(
            groups.expert,
            slice_group=groups.expert_tensor,
            costs=costs,
            timeout_s=groups.timeout_s,
        )

    def problems(self, layer: MoELayer, *, plan: ParallelPlan) -> str | None:
        if not isinstance(layer.experts, GroupedExperts):
            kind = type(layer.experts).__name__
            return f"the weights of {kind} cannot be gathered, only those of plain feed-forwards"
        if layer.experts.adapter is not None:
            return "an adapter (trainable) is not gathered with the weights: take another dispatch"
        return super().problems(layer, plan=plan)
