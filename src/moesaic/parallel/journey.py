"""Journey: how rows get to experts on other ranks and home, as one part of a run's config."""

from collections.abc import Sequence
from typing import Annotated

import torch.distributed as distributed
from pydantic import Field
from torch import nn

from moesaic.core.config import Choice
from moesaic.core.errors import ConfigError
from moesaic.dist.collectives import Group
from moesaic.dist.fit import LinearCost
from moesaic.dist.plan import RankGrid, ParallelPlan
from moesaic.dist.subgroups import split_group
from moesaic.moe.adaptive import AdaptiveDispatcher, DispatchCosts
from moesaic.moe.dispatch import Dispatcher
from moesaic.moe.dispatch_far import AllToAllDispatcher
from moesaic.moe.dispatch_hop import hierarchical_dispatcher
from moesaic.moe.experts import GroupedExperts
from moesaic.moe.overlap import ChunkedAllToAllDispatcher, OverlapDegrees

Count = Annotated[int, Field(ge=1)]
Price = Annotated[float, Field(ge=0)]


class Journey(Choice):
    """Family: how rows get to experts on other ranks and home. It changes time and bytes alone."""

    def build(self, over: Group, *, slices: Group, timeout_s: float) -> Dispatcher:
        """Return the dispatcher of experts that lie over ``over`` and are cut over ``slices``.

        Collective over both groups.
        """
        raise NotImplementedError

    def problems(self, *, plan: ParallelPlan, bank: nn.Module, experts: int) -> str | None:
        """Return why it cannot serve a layer of so many ``experts`` under a plan, if it cannot."""
        del plan, bank, experts
        return None


class Straight(Journey):
    """Every edge is a row that travels, all at once (2006.16668)."""

    def build(self, over: Group, *, slices: Group, timeout_s: float) -> Dispatcher:
        del timeout_s
        return AllToAllDispatcher(over, slice_group=slices)


class TwoHops(Journey):
    """A token crosses to a node once for all its experts there, and is spread inside it."""

    ranks_per_node: Count

    def build(self, over: Group, *, slices: Group, timeout_s: float) -> Dispatcher:
        del slices
        nodes = split_group(over, inner_size=self._on_node(over), timeout_s=timeout_s)
        return hierarchical_dispatcher(inter_node=nodes.outer, intra_node=nodes.inner)

    def problems(self, *, plan: ParallelPlan, bank: nn.Module, experts: int) -> str | None:
        del bank
        groups = RankGrid(plan.axes(num_experts=experts)).groups(("expert",))
        uneven = (why for ranks in groups if (why := self._uneven(ranks)))
        return _no_slices(plan) or next(uneven, None)

    def _on_node(self, over: Group) -> int:
        """Return how many ranks of a group share a node: as many on each."""
        ranks = [0] if over is None else distributed.get_process_group_ranks(over)
        if why := self._uneven(ranks):
            raise ConfigError([f"parallel.journey: {why}"])
        return self._first(ranks)

    def _first(self, ranks: Sequence[int]) -> int:
        """Return how many of the ranks are on the node of the first."""
        return sum(rank // self.ranks_per_node == ranks[0] // self.ranks_per_node for rank in ranks)

    def _uneven(self, ranks: Sequence[int]) -> str | None:
        """Return why ranks cannot travel in two hops: other numbers on other nodes."""
        nodes, each = [rank // self.ranks_per_node for rank in ranks], self._first(ranks)
        runs = [nodes[start : start + each] for start in range(0, len(nodes), each)]
        if all(len(run) == each and len(set(run)) == 1 for run in runs):
            return None
        return (
            f"ranks {list(ranks)} share a layer's experts and lie on nodes {nodes}, of "
            f"{self.ranks_per_node} ranks each: two hops need as many on every node; choose "
            "another parallel.expert, or Straight()"
        )


class InChunks(Journey):
    """Experts work on a chunk of rows while the next is on its way (2206.03382, 2501.10714)."""

    forward: Count = 2
    backward: Count = 2

    def build(self, over: Group, *, slices: Group, timeout_s: float) -> Dispatcher:
        del slices, timeout_s
        return ChunkedAllToAllDispatcher(over, degrees=OverlapDegrees(self.forward, self.backward))

    def problems(self, *, plan: ParallelPlan, bank: nn.Module, experts: int) -> str | None:
        del bank, experts
        return _no_slices(plan)


class Lend(Journey):
    """Experts are lent to rows where that is cheaper for the load of a step (2206.03382).

    What it costs to begin a collective, to send a byte of a row or of a weight, and an expert's
    work on a row. The default counts bytes.
    """

    start_s: Price = 0.0
    row_byte_s: Price = 1.0
    weight_byte_s: Price = 1.0
    work_row_s: Price = 0.0

    def build(self, over: Group, *, slices: Group, timeout_s: float) -> Dispatcher:
        prices = DispatchCosts(
            all_to_all=LinearCost(self.start_s, self.row_byte_s),
            gather_weights=LinearCost(self.start_s, self.weight_byte_s),
            compute=LinearCost(0.0, self.work_row_s),
        )
        return AdaptiveDispatcher(over, slice_group=slices, costs=prices, timeout_s=timeout_s)

    def problems(self, *, plan: ParallelPlan, bank: nn.Module, experts: int) -> str | None:
        del plan, experts
        if not isinstance(bank, GroupedExperts):
            return f"{type(bank).__name__} cannot be lent, only plain feed-forwards can"
        return None


def _no_slices(plan: ParallelPlan) -> str | None:
    if plan.expert_tensor == 1:
        return None
    return f"it has no slices of experts, and expert_tensor is {plan.expert_tensor}: set it to 1"
