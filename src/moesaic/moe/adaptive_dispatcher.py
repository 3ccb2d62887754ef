"""Adaptive: rows travel to experts, or experts are lent to rows, whichever is cheaper this step.

Every rank keeps the same part of the experts throughout. Before a step some ranks may lend each
other their parts, so that rows have fewer places to go to: with nobody lending it is expert
parallelism, with all of them data parallelism, and nothing is ever moved for a switch (Hwang et al.
2023, Tutel, arXiv:2206.03382: ZeRO-sliced experts, one layout for every degree r). Where experts
are cut into m slices, ranks that lend each other q slices repeat a row m/q times: its r.

The choice is made from the load of all ranks, so that they choose alike.

Letters: T tokens, E experts, P ranks that split the experts, M slices, e experts of a rank,
D model dim, F hidden width, G what the activation reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.distributed.collectives import all_gather_rows
from moesaic.distributed.process_groups import Group, group_size, split_group
from moesaic.moe.all_to_all_dispatcher import AllToAllDispatcher
from moesaic.moe.dispatcher import ExpertCompute, LocalDispatcher
from moesaic.moe.experts import FunctionalExperts, GroupedExperts, as_autocast
from moesaic.moe.routing import Routing
from moesaic.ops.grouped_gemm import FeedForwardWeights


@dataclass(frozen=True, slots=True)
class GatherDegrees:
    """How many neighbours lend each other their experts, and their slices: 1 is nobody."""

    experts: int = 1
    slices: int = 1


@dataclass(frozen=True, slots=True)
class LinearCost:
    """An alpha-beta cost: ``alpha`` seconds to start a call, ``beta`` for each unit of its size."""

    alpha: float
    beta: float

    def seconds(self, size: float) -> float:
        return self.alpha + self.beta * size


@dataclass(frozen=True, slots=True)
class DispatchCosts:
    """Seconds: of rows sent and of weights lent (by the byte), of an expert's work (by the row)."""

    all_to_all: LinearCost
    gather_weights: LinearCost
    compute: LinearCost


class AdaptiveDispatcher:
    """Rows or experts: what the prices say of the load of each step.

    Experts lie over ``over`` and their slices over ``slices``, as for an ``AllToAllDispatcher``;
    the bank is an ``GroupedExperts``. ``among`` are the ways to choose from, all by default. Making one is
    collective over both groups; to choose, the host waits for the device once more than to move.
    """

    def __init__(
        self,
        group: Group,
        *,
        costs: DispatchCosts,
        slice_group: Group = None,
        candidates: Sequence[GatherDegrees] | None = None,
        timeout_s: float = 120.0,
    ) -> None:
        self._group, self._slice_group, self._costs = group, slice_group, costs
        choices = candidates or possible_gather_degrees(
            group_size(group), slices=group_size(slice_group)
        )
        self._candidates = {each: self._make_groups(each, timeout_s=timeout_s) for each in choices}
        self._all_to_all = AllToAllDispatcher(group, slice_group=slice_group)
        self.dispatch, self.combine = self._all_to_all.dispatch, self._all_to_all.combine

    def run_experts(
        self, x: Float[Tensor, "T D"], *, routing: Routing, experts: ExpertCompute
    ) -> Float[Tensor, "T D"]:
        if group_size(self._group) * group_size(self._slice_group) == 1:
            return LocalDispatcher().run_experts(x, routing=routing, experts=experts)
        if not isinstance(experts, GroupedExperts):
            raise TypeError(f"only banks of feed-forwards can be lent, not {type(experts)}")
        bank = experts

        def work(x: Tensor, _: ExpertCompute) -> Tensor:
            way = self._candidates[self.choose(x, routing=routing, experts=bank)]
            lent = FunctionalExperts(
                _gather_weights(bank.weights, groups=way, dtype=x.dtype), bank.activation
            )
            rows = AllToAllDispatcher(way.all_to_all, slice_group=way.all_to_all_slices)
            return rows.run_experts(x, routing=routing, experts=lent)

        return bank.in_one_call(as_autocast(x), function=work)

    def _make_groups(self, way: GatherDegrees, *, timeout_s: float) -> "_GatherGroups":
        experts = split_group(self._group, inner_size=way.experts, timeout_s=timeout_s)
        cuts = split_group(self._slice_group, inner_size=way.slices, timeout_s=timeout_s)
        return _GatherGroups(experts.inner, cuts.inner, experts.outer, cuts.outer)

    def choose(
        self, x: Float[Tensor, "T D"], *, routing: Routing, experts: GroupedExperts
    ) -> GatherDegrees:
        """Return the way with the least seconds, the same on every rank. Collective."""
        if len(self._candidates) == 1:
            return next(iter(self._candidates))
        ranks, cuts = group_size(self._group), group_size(self._slice_group)
        own = routing.load()[None]
        row = all_gather_rows(own, group=self._slice_group, sizes=[1] * cuts)
        table = all_gather_rows(row, group=self._group, sizes=[cuts] * ranks)
        step = StepLoad(
            table.view(ranks, cuts, -1).cpu(),
            row_bytes=x.shape[1] * x.element_size(),
            bank_bytes=(experts.up.numel() + experts.down.numel()) * x.element_size(),
        )
        return min(self._candidates, key=lambda way: step.seconds(way, costs=self._costs))


def possible_gather_degrees(ranks: int, *, slices: int) -> list[GatherDegrees]:
    """Return all ways: first slices are lent, then, once they make whole experts, experts."""
    within = [GatherDegrees(1, cuts) for cuts in range(1, slices + 1) if slices % cuts == 0]
    across = [GatherDegrees(each, slices) for each in range(2, ranks + 1) if ranks % each == 0]
    return within + across


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What is known of a step before its rows move: ``load[p, m, e]`` rows of each rank's tokens
    for each expert, and the bytes of a row and of the experts that one rank keeps.
    """

    load: Int[Tensor, "P M E"]
    row_bytes: int
    bank_bytes: int

    def seconds(self, degrees: GatherDegrees, *, costs: DispatchCosts) -> float:
        """Return the time of the busiest rank, forward and backward."""
        moved = self.traffic(degrees)
        once = costs.gather_weights.seconds(moved.weights) if moved.weights else 0.0
        once += sum(
            2 * costs.all_to_all.seconds(size) for size in (moved.rows, moved.copies) if size
        )
        return 2 * once + 3 * costs.compute.seconds(moved.work)

    def traffic(self, degrees: GatherDegrees) -> "StepTraffic":
        """Return what the busiest rank moves, each thing by itself."""
        ranks, cuts, _ = self.load.shape
        places, left = ranks // degrees.experts, cuts // degrees.slices
        # [from place, rank of the run, slice, to place]
        rows = self.load.view(places, degrees.experts, cuts, places, -1).sum(-1)
        stay = rows.diagonal(dim1=0, dim2=3).permute(2, 0, 1)
        sent, came = rows.sum(3), rows.sum(0).permute(2, 0, 1)
        there = came.view(places, degrees.experts, left, degrees.slices)
        copies = there.sum(2, keepdim=True) - there
        return StepTraffic(
            rows=float(torch.maximum(sent - stay, came - stay).max()) * self.row_bytes,
            copies=float(copies.max()) * self.row_bytes,
            weights=float((degrees.experts * degrees.slices - 1) * self.bank_bytes),
            work=float(there.sum(2).max()) / left,
        )


@dataclass(frozen=True, slots=True)
class StepTraffic:
    """Of the busiest rank: bytes of rows to other ranks, of rows repeated for other slices and of
    weights, one way each; and the rows that its experts work on, by whole experts.
    """

    rows: float
    copies: float
    weights: float
    work: float


@dataclass(frozen=True, slots=True)
class _GatherGroups:
    experts: Group
    slices: Group
    all_to_all: Group
    all_to_all_slices: Group


def _gather_weights(
    banks: FeedForwardWeights, *, groups: _GatherGroups, dtype: torch.dtype
) -> FeedForwardWeights:
    """Return this rank's banks and those of its neighbours. Collective."""
    segments = banks.up.shape[2] // banks.down.shape[1]  # two if gated: each is cut by itself

    def lend(bank: Tensor, *, dim: int, segments: int) -> Tensor:
        wide = _gather_slices(bank.to(dtype), group=groups.slices, dim=dim, segments=segments)
        return _gather_experts(wide, group=groups.experts)

    up, down = lend(banks.up, dim=2, segments=segments), lend(banks.down, dim=1, segments=1)
    if banks.up_bias is None or banks.down_bias is None:
        return FeedForwardWeights(up, down)
    up_bias = lend(banks.up_bias, dim=1, segments=segments)
    return FeedForwardWeights(
        up, down, up_bias, _gather_experts(banks.down_bias.to(dtype), group=groups.experts)
    )


def _gather_experts(bank: Float[Tensor, "e *D"], *, group: Group) -> Float[Tensor, "E *D"]:
    """The experts of several ranks, in order."""
    return all_gather_rows(bank, group=group, sizes=[bank.shape[0]] * group_size(group))


def _gather_slices(bank: Tensor, *, group: Group, dim: int, segments: int) -> Tensor:
    """The slices of several ranks side by side along ``dim``, in each of its segments."""
    cuts = group_size(group)
    if cuts == 1:
        return bank
    every = _gather_experts(bank, group=group).unflatten(0, (cuts, -1))
    apart = every.unflatten(dim + 1, (segments, -1)).movedim(0, dim + 1)
    return apart.flatten(dim, dim + 2)
