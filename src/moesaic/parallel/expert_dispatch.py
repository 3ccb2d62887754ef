"""Journey: how rows get to experts on other ranks and home, as one part of a run's config."""

from collections.abc import Sequence
from typing import Annotated

import torch.distributed as distributed
from pydantic import Field
from torch import nn

from moesaic.core.config import Choice
from moesaic.core.errors import ConfigError
from moesaic.distributed.parallel_plan import ParallelPlan, RankGrid
from moesaic.distributed.process_groups import Group, split_group
from moesaic.moe.adaptive_dispatcher import AdaptiveDispatcher, DispatchCosts, LinearCost
from moesaic.moe.all_to_all_dispatcher import AllToAllDispatcher, hierarchical_dispatcher
from moesaic.moe.chunked_dispatcher import ChunkedAllToAllDispatcher, OverlapDegrees
from moesaic.moe.dispatcher import Dispatcher
from moesaic.moe.experts import GroupedExperts

PositiveCount = Annotated[int, Field(ge=1)]
NonNegativeCost = Annotated[float, Field(ge=0)]


class ExpertDispatch(Choice):
    """Family: how rows get to experts on other ranks and home. It changes time and bytes alone."""

    def build(
        self, expert_group: Group, *, expert_tensor_group: Group, timeout_s: float
    ) -> Dispatcher:
        """Return the dispatcher of experts that lie over ``over`` and are cut over ``slices``.

        Collective over both groups.
        """
        raise NotImplementedError

    def problems(self, *, plan: ParallelPlan, weights: nn.Module, experts: int) -> str | None:
        """Return why it cannot serve a layer of so many ``experts`` under a plan, if it cannot."""
        del plan, weights, experts
        return None


class AllToAll(ExpertDispatch):
    """Every edge is a row that travels, all at once (2006.16668)."""

    def build(
        self, expert_group: Group, *, expert_tensor_group: Group, timeout_s: float
    ) -> Dispatcher:
        del timeout_s
        return AllToAllDispatcher(expert_group, slice_group=expert_tensor_group)


class HierarchicalAllToAll(ExpertDispatch):
    """A token crosses to a node once for all its experts there, and is spread inside it."""

    ranks_per_node: PositiveCount

    def build(
        self, expert_group: Group, *, expert_tensor_group: Group, timeout_s: float
    ) -> Dispatcher:
        del expert_tensor_group
        nodes = split_group(
            expert_group, inner_size=self._ranks_on_each_node(expert_group), timeout_s=timeout_s
        )
        return hierarchical_dispatcher(inter_node=nodes.outer, intra_node=nodes.inner)

    def problems(self, *, plan: ParallelPlan, weights: nn.Module, experts: int) -> str | None:
        del weights
        groups = RankGrid(plan.axes(num_experts=experts)).groups(("expert",))
        uneven = (why for ranks in groups if (why := self._uneven_nodes(ranks)))
        return _expert_tensor_problem(plan) or next(uneven, None)

    def _ranks_on_each_node(self, over: Group) -> int:
        """Return how many ranks of a group share a node: as many on each."""
        ranks = [0] if over is None else distributed.get_process_group_ranks(over)
        if why := self._uneven_nodes(ranks):
            raise ConfigError([f"parallel.dispatch: {why}"])
        return self._ranks_on_first_node(ranks)

    def _ranks_on_first_node(self, ranks: Sequence[int]) -> int:
        """Return how many of the ranks are on the node of the first."""
        return sum(rank // self.ranks_per_node == ranks[0] // self.ranks_per_node for rank in ranks)

    def _uneven_nodes(self, ranks: Sequence[int]) -> str | None:
        """Return why ranks cannot travel in two hops: other numbers on other nodes."""
        nodes, each = (
            [rank // self.ranks_per_node for rank in ranks],
            self._ranks_on_first_node(ranks),
        )
        runs = [nodes[start : start + each] for start in range(0, len(nodes), each)]
        if all(len(run) == each and len(set(run)) == 1 for run in runs):
            return None
        return (
            f"ranks {list(ranks)} share a layer's experts and lie on nodes {nodes}, of "
            f"{self.ranks_per_node} ranks each: two hops need as many on every node; choose "
            "another parallel.expert, or AllToAll()"
        )


class ChunkedAllToAll(ExpertDispatch):
    """Experts work on a chunk of rows while the next is on its way (2206.03382, 2501.10714)."""

    forward: PositiveCount = 2
    backward: PositiveCount = 2

    def build(
        self, expert_group: Group, *, expert_tensor_group: Group, timeout_s: float
    ) -> Dispatcher:
        del expert_tensor_group, timeout_s
        return ChunkedAllToAllDispatcher(
            expert_group, degrees=OverlapDegrees(self.forward, self.backward)
        )

    def problems(self, *, plan: ParallelPlan, weights: nn.Module, experts: int) -> str | None:
        del weights, experts
        return _expert_tensor_problem(plan)


class AdaptiveExperts(ExpertDispatch):
    """Experts are lent to rows where that is cheaper for the load of a step (2206.03382).

    What it costs to begin a collective, to send a byte of a row or of a weight, and an expert's
    work on a row. The default counts bytes.
    """

    start_s: NonNegativeCost = 0.0
    row_byte_s: NonNegativeCost = 1.0
    weight_byte_s: NonNegativeCost = 1.0
    work_row_s: NonNegativeCost = 0.0

    def build(
        self, expert_group: Group, *, expert_tensor_group: Group, timeout_s: float
    ) -> Dispatcher:
        prices = DispatchCosts(
            all_to_all=LinearCost(self.start_s, self.row_byte_s),
            gather_weights=LinearCost(self.start_s, self.weight_byte_s),
            compute=LinearCost(0.0, self.work_row_s),
        )
        return AdaptiveDispatcher(
            expert_group, slice_group=expert_tensor_group, costs=prices, timeout_s=timeout_s
        )

    def problems(self, *, plan: ParallelPlan, weights: nn.Module, experts: int) -> str | None:
        del plan, experts
        if not isinstance(weights, GroupedExperts):
            return f"{type(weights).__name__} cannot be lent, only plain feed-forwards can"
        return None


def _expert_tensor_problem(plan: ParallelPlan) -> str | None:
    if plan.expert_tensor == 1:
        return None
    return f"it has no slices of experts, and expert_tensor is {plan.expert_tensor}: set it to 1"
