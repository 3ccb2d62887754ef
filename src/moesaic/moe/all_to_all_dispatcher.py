"""AllToAllDispatcher: experts are split over ranks, and rows travel to them and back.

Of a group of n ranks, rank r owns the experts [r*E/n, (r+1)*E/n) (Lepikhin et al. 2021, GShard,
arXiv:2006.16668). Each expert may moreover be cut along its hidden width over the ranks of a second
group: these see the same rows, and the parts of an answer are added (Liu et al. 2025,
MoE Parallel Folding, arXiv:2504.14960). Rows travel in the dtype in which experts compute.

Letters: T tokens, N edges, E experts of all ranks, S rows sent, R rows received, D model dim.

Hop: a token goes to a group of experts once, however many of its experts are there.

With its row travel the edges that lead on, so the far side is a mixture over fewer experts, which
an inner dispatcher serves; one row per token and place comes home, summed there. Two hops, first
over the nodes and then inside one, are a hierarchical all-to-all whose slow links carry each token
once per node (Hwang et al. 2023, Tutel, arXiv:2206.03382, has the two hops; that the first is
without repeats is ours). Partial sums are rounded to the dtype of the rows.

Letters: T tokens, N edges, E experts, P places (ranks of a group), R rows received, D model dim.
"""

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.distributed.collectives import all_gather_rows, all_to_all, reduce_scatter_rows
from moesaic.distributed.process_groups import Group, group_rank, group_size
from moesaic.moe.dispatcher import (
    DispatchedRows,
    Dispatcher,
    DispatchHandle,
    ExpertCompute,
    LocalDispatcher,
    apply_experts,
    sort_edges,
)
from moesaic.moe.experts import as_autocast
from moesaic.moe.routing import Routing
from moesaic.ops.moe_kernel import Edges, permute_tokens, unpermute_tokens
from moesaic.ops.permute import RowGroups, group_by_expert, permute


@runtime_checkable
class CountReader(Protocol):
    """How the host learns the numbers of rows that it has to know before they move."""

    def read(self, sums: Int[Tensor, "C"], *, edges: int, ranks: int) -> list[int]:
        """Return ``sums``: rows to or from one of so many ``ranks``, of so many ``edges`` each."""
        ...


class SyncCountReader:
    """The host waits for the device and reads them."""

    def read(self, sums: Int[Tensor, "C"], *, edges: int, ranks: int) -> list[int]:
        del edges, ranks
        return sums.tolist()


class Supposes:
    """Every rank sends every other the same: a forecast, for tensors that hold no numbers."""

    def read(self, sums: Int[Tensor, "C"], *, edges: int, ranks: int) -> list[int]:
        if edges % ranks:
            raise ValueError(f"{edges} edges cannot be supposed to go evenly to {ranks} ranks")
        return [edges // ranks] * sums.numel()


class AllToAllDispatcher:
    """Experts live evenly over ``over``; each is cut into slices over ``slices``.

    The bank given to ``carry`` holds this rank's part: E/n experts of 1/m of the hidden width,
    without a ``down`` bias where m > 1 (every slice would add it). Edges that lead nowhere do not
    travel. By default the ``host`` waits for the device once, to learn how many rows come and go.
    """

    def __init__(
        self, group: Group, *, slice_group: Group = None, host: CountReader | None = None
    ) -> None:
        self._group, self._slice_group, self._host = group, slice_group, host or SyncCountReader()

    def run_experts(
        self, x: Float[Tensor, "T D"], *, routing: Routing, experts: ExpertCompute
    ) -> Float[Tensor, "T D"]:
        if group_size(self._group) * group_size(self._slice_group) == 1:
            return LocalDispatcher().run_experts(x, routing=routing, experts=experts)
        edges = sort_edges(routing)
        trip = self._plan(edges)
        rows = _dispatch_rows(x, edges=edges, plan=trip)
        return _combine_rows(
            apply_experts(rows, groups=trip.groups, experts=experts), edges=edges, plan=trip
        )

    def dispatch(self, x: Float[Tensor, "T D"], routing: Routing) -> DispatchedRows:
        edges = sort_edges(routing)
        trip = self._plan(edges)
        rows = sort_rows(_dispatch_rows(x, edges=edges, plan=trip), groups=trip.groups)
        return DispatchedRows(rows, trip.groups, AllToAllHandle(edges, trip))

    def combine(self, y: Float[Tensor, "R D"], dispatched: DispatchedRows) -> Float[Tensor, "T D"]:
        return dispatched.handle.combine(y)

    def _plan(self, edges: Edges) -> "AllToAllPlan":
        """Exchange how many rows lead to each expert, and learn the sums. Collective."""
        over, slices, counts = self._group, self._slice_group, edges.groups.rows_per_expert
        ranks, cuts = group_size(over), group_size(slices)
        incoming = all_to_all_counts(counts, group=over)
        every = all_gather_rows(
            incoming, group=slices, sizes=[ranks] * cuts
        )  # [cut and rank, expert]
        sums = torch.cat([counts.view(ranks, -1).sum(1), every.sum(1)])
        numbers = self._host.read(sums, edges=edges.token.numel(), ranks=ranks)
        sent, arrived = tuple(numbers[:ranks]), numbers[ranks:]
        blocks = [tuple(arrived[cut * ranks :][:ranks]) for cut in range(cuts)]
        shared = tuple(sum(block) for block in blocks)
        groups = group_blocks_by_expert(every, rows=sum(shared))
        return AllToAllPlan(over, slices, sent, blocks[group_rank(slices)], shared, groups)


@dataclass(frozen=True, slots=True)
class AllToAllPlan:
    """Rows per rank: sent, received, and held by each rank of ``slices``; ``groups`` sorts them."""

    group: Group
    slice_group: Group
    send_sizes: tuple[int, ...]
    receive_sizes: tuple[int, ...]
    slice_sizes: tuple[int, ...]
    groups: RowGroups


@dataclass(frozen=True, slots=True)
class AllToAllHandle:
    """Rows that came from other ranks: the same way back, then weighed and added at home."""

    edges: Edges
    plan: AllToAllPlan

    def combine(self, y: Float[Tensor, "R D"]) -> Float[Tensor, "T D"]:
        y = unsort_rows(y, groups=self.plan.groups)
        return _combine_rows(y, edges=self.edges, plan=self.plan)


def _dispatch_rows(
    x: Float[Tensor, "T D"], *, edges: Edges, plan: AllToAllPlan
) -> Float[Tensor, "R D"]:
    rows = permute_tokens(as_autocast(x), edges=edges)[: sum(plan.send_sizes)]
    rows = all_to_all(
        rows, group=plan.group, input_splits=plan.send_sizes, output_splits=plan.receive_sizes
    )
    return all_gather_rows(rows, group=plan.slice_group, sizes=plan.slice_sizes)


def _combine_rows(
    y: Float[Tensor, "R D"], *, edges: Edges, plan: AllToAllPlan
) -> Float[Tensor, "T D"]:
    y = reduce_scatter_rows(y, group=plan.slice_group, sizes=plan.slice_sizes)
    y = all_to_all(
        y, group=plan.group, input_splits=plan.receive_sizes, output_splits=plan.send_sizes
    )
    return unpermute_sum(y, edges=edges)


def unpermute_sum(y: Float[Tensor, "S D"], *, edges: Edges) -> Float[Tensor, "T D"]:
    """Add the answers of the edges that lead somewhere to their tokens."""
    nowhere = edges.groups.order.numel() - y.shape[0]
    return unpermute_tokens(F.pad(y, (0, 0, 0, nowhere)) if nowhere else y, edges=edges)


def sort_rows(rows: Float[Tensor, "R D"], *, groups: RowGroups) -> Float[Tensor, "R D"]:
    """Return rows sorted by expert; unlike an index, its backward is a gather as well."""
    return permute(rows, token=groups.order, groups=groups, per_token=1)


def unsort_rows(rows: Float[Tensor, "R D"], *, groups: RowGroups) -> Float[Tensor, "R D"]:
    """Return sorted rows in the order in which they came."""
    return sort_rows(rows, groups=replace(groups, order=groups.inverse, inverse=groups.order))


def all_to_all_counts(counts: Int[Tensor, "E"], *, group: Group) -> Int[Tensor, "P e"]:
    """Return how many rows each rank has for each of the experts here. Collective."""
    ranks = group_size(group)
    if counts.numel() % ranks:
        raise ValueError(f"{counts.numel()} experts cannot be split evenly over {ranks} ranks")
    each = [1] * ranks
    return all_to_all(counts.view(ranks, -1), group=group, input_splits=each, output_splits=each)


def group_blocks_by_expert(blocks: Int[Tensor, "B E"], *, rows: int) -> RowGroups:
    """Sort rows that come in B blocks, each sorted by expert already: ``blocks`` are the counts."""
    every = torch.arange(blocks.shape[1], device=blocks.device).repeat(blocks.shape[0])
    expert = every.repeat_interleave(blocks.flatten(), output_size=rows)
    return group_by_expert(expert, num_experts=blocks.shape[1])


class DeduplicatedAllToAllDispatcher:
    """Experts live evenly over ``over``, by rank; ``inner`` finds them from there.

    By default they are all on the rank itself. The host waits for the device once per hop.
    """

    def __init__(self, group: Group, *, inner: Dispatcher | None = None) -> None:
        self._group, self._inner = group, inner or LocalDispatcher()

    def run_experts(
        self, x: Float[Tensor, "T D"], *, routing: Routing, experts: ExpertCompute
    ) -> Float[Tensor, "T D"]:
        if group_size(self._group) == 1:
            return self._inner.run_experts(x, routing=routing, experts=experts)
        leap = _dispatch_deduplicated(x, routing=routing, group=self._group)
        return leap.combine(
            self._inner.run_experts(leap.rows, routing=leap.routing, experts=experts)
        )

    def dispatch(self, x: Float[Tensor, "T D"], routing: Routing) -> DispatchedRows:
        leap = _dispatch_deduplicated(x, routing=routing, group=self._group)
        parcel = self._inner.dispatch(leap.rows, leap.routing)
        return replace(parcel, handle=_NestedHandle(parcel.handle, leap))

    def combine(self, y: Float[Tensor, "R D"], dispatched: DispatchedRows) -> Float[Tensor, "T D"]:
        return dispatched.handle.combine(y)


def hierarchical_dispatcher(
    *, inter_node: Group, intra_node: Group
) -> DeduplicatedAllToAllDispatcher:
    """Return the dispatcher of experts over ranks that are ``inside`` one of several ``nodes``.

    ``nodes`` holds the ranks of one place in every node; experts lie over (node, rank), in order.
    """
    return DeduplicatedAllToAllDispatcher(
        inter_node, inner=DeduplicatedAllToAllDispatcher(intra_node)
    )


@dataclass(frozen=True, slots=True)
class _DeduplicatedRows:
    """Tokens that came here, their edges from here on, and the way of their sums home."""

    group: Group
    rows: Float[Tensor, "R D"]
    routing: Routing
    edges: Edges
    send_sizes: tuple[int, ...]
    receive_sizes: tuple[int, ...]

    def combine(self, y: Float[Tensor, "R D"]) -> Float[Tensor, "T D"]:
        y = all_to_all(
            y, group=self.group, input_splits=self.receive_sizes, output_splits=self.send_sizes
        )
        return unpermute_sum(y, edges=self.edges)


@dataclass(frozen=True, slots=True)
class _NestedHandle:
    inner: DispatchHandle
    outer: _DeduplicatedRows

    def combine(self, y: Float[Tensor, "R D"]) -> Float[Tensor, "T D"]:
        return self.outer.combine(self.inner.combine(y))


def _dispatch_deduplicated(
    x: Float[Tensor, "T D"], *, routing: Routing, group: Group
) -> _DeduplicatedRows:
    places = group_size(group)
    if routing.num_experts % places:
        raise ValueError(
            f"{routing.num_experts} experts cannot be split evenly over {places} ranks"
        )
    each = routing.num_experts // places
    place = routing.expert // each  # that of a dropped edge is ``places``
    first = _first_occurrence(
        routing.token * (places + 1) + place, keys=routing.num_tokens * (places + 1)
    )
    alone = first == torch.arange(first.numel(), device=first.device)
    once = replace(
        routing,
        expert=torch.where(alone, place, places),
        weight=torch.ones_like(routing.weight, dtype=torch.float32).detach(),
        num_experts=places,
    )
    edges, onward = sort_edges(once), group_by_expert(place, num_experts=places)
    counts = torch.stack([edges.groups.rows_per_expert, onward.rows_per_expert], 1)
    trip = _ExchangedSizes.exchange(counts, group=group)
    starts = edges.groups.offsets - edges.groups.rows_per_expert
    live = onward.order[: sum(trip.edges_sent)]
    at = edges.groups.inverse[first[live]] - starts[place[live]]  # among the rows of one place
    address = at * each + routing.expert[live] % each
    out = {"group": group, "input_splits": trip.edges_sent, "output_splits": trip.edges_received}
    address = all_to_all(address, **out)
    weight = all_to_all(routing.weight[live], **out)
    rows = permute_tokens(as_autocast(x), edges=edges)[: sum(trip.sent)]
    rows = all_to_all(rows, group=group, input_splits=trip.sent, output_splits=trip.received)
    token = address // each + trip.row_offsets(address)
    there = Routing(token, address % each, weight, rows.shape[0], each)
    return _DeduplicatedRows(group, rows, there, edges, trip.sent, trip.received)


def _first_occurrence(key: Int[Tensor, "N"], *, keys: int) -> Int[Tensor, "N"]:
    """Return, for each edge, the first one with the same key."""
    every = torch.arange(key.numel(), device=key.device)
    first = torch.full((keys,), key.numel(), device=key.device)
    return first.scatter_reduce_(0, key, every, "amin")[key]


@dataclass(frozen=True, slots=True)
class _ExchangedSizes:
    """Rows and edges that go to each place and come from it."""

    sent: tuple[int, ...]
    edges_sent: tuple[int, ...]
    received: tuple[int, ...]
    edges_received: tuple[int, ...]

    @staticmethod
    def exchange(counts: Int[Tensor, "P 2"], *, group: Group) -> "_ExchangedSizes":
        each = [1] * counts.shape[0]
        incoming = all_to_all(counts, group=group, input_splits=each, output_splits=each)
        numbers = torch.cat([counts, incoming], 1).t().tolist()
        return _ExchangedSizes(*(tuple(line) for line in numbers))

    def row_offsets(self, edges: Int[Tensor, "N"]) -> Int[Tensor, "N"]:
        """Return, for each edge that came, how many rows came from the places before its own."""
        starts = torch.tensor([0, *accumulate(self.received)][:-1], device=edges.device)
        lengths = torch.tensor(self.edges_received, device=edges.device)
        return starts.repeat_interleave(lengths, output_size=edges.numel())
