"""Adaptive dispatcher: sends rows to experts or gathers expert weights, whichever costs less.

Every rank keeps the same part of the experts throughout. In each step neighbouring ranks may gather
each other's weights, so that rows are exchanged between fewer ranks: without a gather it is expert
parallelism, with all ranks data parallelism, and a change moves no parameters (Hwang et al. 2023,
Tutel, arXiv:2206.03382: ZeRO-sliced experts, one layout for every degree r). Where experts are
split into m slices and q of them are gathered, a row is sent to m/q ranks: Tutel's r.

The choice depends on the load of all ranks, so all ranks make the same.

Letters: T tokens, E experts, P ranks that split the experts, M slices, e experts of a rank,
D model dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.distributed.collectives import all_gather_rows
from moesaic.distributed.process_groups import Group, group_rank, group_size, split_group
from moesaic.moe.all_to_all_dispatcher import AllToAllDispatcher
from moesaic.moe.dispatcher import ExpertCompute, LocalDispatcher
from moesaic.moe.experts import FunctionalExperts, GroupedExperts
from moesaic.moe.routing import Routing
from moesaic.ops.autocast import as_autocast
from moesaic.ops.grouped_gemm import FeedForwardWeights


@dataclass(frozen=True, slots=True)
class GatherDegrees:
    """How many neighbouring ranks gather each other's experts, and slices; 1 is no gather."""

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
    """Costs in seconds: rows sent and weights gathered by the byte, expert compute by the row."""

    all_to_all: LinearCost
    gather_weights: LinearCost
    compute: LinearCost


class AdaptiveDispatcher:
    """Chooses the cheapest ``GatherDegrees`` for the load of each step.

    Experts are split over ``group`` and ``slice_group`` as for an ``AllToAllDispatcher``, and must
    be ``GroupedExperts``. ``candidates`` are the degrees to choose from, all by default. The
    constructor is collective over both groups; the choice makes the host wait for the device once
    more than an ``AllToAllDispatcher``.
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
        ranks, slices = group_size(group), group_size(slice_group)
        choices = candidates or possible_gather_degrees(ranks, slices=slices)
        self._candidates = {each: self._make_groups(each, timeout_s=timeout_s) for each in choices}

    def run_experts(
        self, x: Float[Tensor, "T D"], *, routing: Routing, experts: ExpertCompute
    ) -> Float[Tensor, "T D"]:
        if group_size(self._group) * group_size(self._slice_group) == 1:
            return LocalDispatcher().run_experts(x, routing=routing, experts=experts)
        if not isinstance(experts, GroupedExperts):
            raise TypeError(
                f"only the weights of GroupedExperts can be gathered, not {type(experts)}"
            )
        module = experts

        def gather_and_run(x: Tensor, _: ExpertCompute) -> Tensor:
            groups = self._candidates[self.choose(x, routing=routing, experts=module)]
            weights = _gather_weights(module.weights, groups=groups, dtype=x.dtype)
            gathered = FunctionalExperts(weights, module.activation)
            exchange = AllToAllDispatcher(groups.all_to_all, slice_group=groups.all_to_all_slices)
            return exchange.run_experts(x, routing=routing, experts=gathered)

        return module.in_one_call(as_autocast(x), function=gather_and_run)

    def _make_groups(self, degrees: GatherDegrees, *, timeout_s: float) -> "_GatherGroups":
        experts = split_group(self._group, inner_size=degrees.experts, timeout_s=timeout_s)
        slices = split_group(self._slice_group, inner_size=degrees.slices, timeout_s=timeout_s)
        return _GatherGroups(experts.inner, slices.inner, experts.outer, slices.outer)

    def choose(
        self, x: Float[Tensor, "T D"], *, routing: Routing, experts: GroupedExperts
    ) -> GatherDegrees:
        """Return the degrees of lowest cost, the same on every rank. Collective.

        Tells ``experts`` of the rows that all ranks have for each: all 1 if nothing is to choose.
        """
        own = experts.up.shape[0]
        if len(self._candidates) == 1:
            experts.before_use(torch.ones(own, dtype=torch.long))
            return next(iter(self._candidates))
        ranks, slices = group_size(self._group), group_size(self._slice_group)
        local = routing.load()[None]
        row = all_gather_rows(local, group=self._slice_group, sizes=[1] * slices)
        table = all_gather_rows(row, group=self._group, sizes=[slices] * ranks)
        step = StepLoad(
            table.view(ranks, slices, -1).cpu(),
            row_bytes=x.shape[1] * x.element_size(),
            weight_bytes=(experts.up.numel() + experts.down.numel()) * x.element_size(),
        )
        experts.before_use(step.load.sum((0, 1)).split(own)[group_rank(self._group)])
        return min(self._candidates, key=lambda degrees: step.seconds(degrees, costs=self._costs))


def possible_gather_degrees(ranks: int, *, slices: int) -> list[GatherDegrees]:
    """Return all degrees: slices up to whole experts first, then experts."""
    of_slices = [GatherDegrees(1, each) for each in range(1, slices + 1) if slices % each == 0]
    of_experts = [GatherDegrees(each, slices) for each in range(2, ranks + 1) if ranks % each == 0]
    return of_slices + of_experts


@dataclass(frozen=True, slots=True)
class StepLoad:
    """The load of a step before dispatch: ``load[p, m, e]`` rows of each rank for each expert.

    ``row_bytes`` is the size of a row, ``weight_bytes`` that of one rank's expert weights.
    """

    load: Int[Tensor, "P M E"]
    row_bytes: int
    weight_bytes: int

    def seconds(self, degrees: GatherDegrees, *, costs: DispatchCosts) -> float:
        """Return the time of the busiest rank, forward and backward."""
        sent = self.traffic(degrees)
        once = costs.gather_weights.seconds(sent.weights) if sent.weights else 0.0
        once += sum(2 * costs.all_to_all.seconds(size) for size in (sent.rows, sent.copies) if size)
        return 2 * once + 3 * costs.compute.seconds(sent.work)

    def traffic(self, degrees: GatherDegrees) -> "StepTraffic":
        """Return the largest traffic of any rank, each kind by itself."""
        ranks, slices, _ = self.load.shape
        sets, copies = ranks // degrees.experts, slices // degrees.slices
        # [from set of ranks, rank of the set, slice, to set]
        rows = self.load.view(sets, degrees.experts, slices, sets, -1).sum(-1)
        local = rows.diagonal(dim1=0, dim2=3).permute(2, 0, 1)
        sent, received = rows.sum(3), rows.sum(0).permute(2, 0, 1)
        by_slice = received.view(sets, degrees.experts, copies, degrees.slices)
        repeated = by_slice.sum(2, keepdim=True) - by_slice
        return StepTraffic(
            rows=float(torch.maximum(sent - local, received - local).max()) * self.row_bytes,
            copies=float(repeated.max()) * self.row_bytes,
            weights=float((degrees.experts * degrees.slices - 1) * self.weight_bytes),
            work=float(by_slice.sum(2).max()) / copies,
        )


@dataclass(frozen=True, slots=True)
class StepTraffic:
    """The traffic of the busiest rank, in bytes of one direction, and its expert rows.

    ``rows`` go to other ranks, ``copies`` to other slices, ``weights`` are gathered; ``work`` is
    the number of rows that its experts compute, in whole experts.
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
    weights: FeedForwardWeights, *, groups: _GatherGroups, dtype: torch.dtype
) -> FeedForwardWeights:
    """Return the expert weights of this rank and of its neighbours. Collective."""
    # two segments if the activation is gated: each is split by itself
    segments = weights.up.shape[2] // weights.down.shape[1]

    def gather(weight: Tensor, *, dim: int, segments: int) -> Tensor:
        full = _gather_slices(weight.to(dtype), group=groups.slices, dim=dim, segments=segments)
        return _gather_experts(full, group=groups.experts)

    up = gather(weights.up, dim=2, segments=segments)
    down = gather(weights.down, dim=1, segments=1)
    if weights.up_bias is None or weights.down_bias is None:
        return FeedForwardWeights(up, down)
    up_bias = gather(weights.up_bias, dim=1, segments=segments)
    down_bias = _gather_experts(weights.down_bias.to(dtype), group=groups.experts)
    return FeedForwardWeights(up, down, up_bias, down_bias)


def _gather_experts(weight: Float[Tensor, "e *D"], *, group: Group) -> Float[Tensor, "E *D"]:
    """Return the experts of several ranks, in order."""
    return all_gather_rows(weight, group=group, sizes=[weight.shape[0]] * group_size(group))


def _gather_slices(weight: Tensor, *, group: Group, dim: int, segments: int) -> Tensor:
    """Return the slices of several ranks concatenated along ``dim``, in each of its segments."""
    slices = group_size(group)
    if slices == 1:
        return weight
    stacked = _gather_experts(weight, group=group).unflatten(0, (slices, -1))
    split = stacked.unflatten(dim + 1, (segments, -1)).movedim(0, dim + 1)
    return split.flatten(dim, dim + 2)
