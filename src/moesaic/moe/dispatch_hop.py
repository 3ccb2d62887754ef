"""Hop: a token goes to a group of experts once, however many of its experts are there.

With its row travel the edges that lead on, so the far side is a mixture over fewer experts, which
an inner dispatcher serves; one row per token and place comes home, summed there. Two hops, first
over the nodes and then inside one, are a hierarchical all-to-all whose slow links carry each token
once per node (Hwang et al. 2023, Tutel, arXiv:2206.03382, has the two hops; that the first is
without repeats is ours). Partial sums are rounded to the dtype of the rows.

Letters: T tokens, N edges, E experts, P places (ranks of a group), R rows received, D model dim.
"""

from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.dist.collectives import Group, all_to_all, group_size
from moesaic.moe.dispatch import Dispatcher, LocalDispatcher, DispatchedRows, ExpertCompute, DispatchHandle, sort_edges
from moesaic.moe.dispatch_far import unpermute_sum
from moesaic.moe.experts import as_autocast
from moesaic.moe.routing import Routing
from moesaic.ops.group import group_by_expert
from moesaic.ops.mixture import Edges, permute_tokens


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
        return leap.combine(self._inner.run_experts(leap.rows, routing=leap.routing, experts=experts))

    def dispatch(self, x: Float[Tensor, "T D"], routing: Routing) -> DispatchedRows:
        leap = _dispatch_deduplicated(x, routing=routing, group=self._group)
        parcel = self._inner.dispatch(leap.rows, leap.routing)
        return replace(parcel, way=_NestedHandle(parcel.handle, leap))

    def combine(self, y: Float[Tensor, "R D"], dispatched: DispatchedRows) -> Float[Tensor, "T D"]:
        return dispatched.handle.combine(y)


def hierarchical_dispatcher(*, inter_node: Group, intra_node: Group) -> DeduplicatedAllToAllDispatcher:
    """Return the dispatcher of experts over ranks that are ``inside`` one of several ``nodes``.

    ``nodes`` holds the ranks of one place in every node; experts lie over (node, rank), in order.
    """
    return DeduplicatedAllToAllDispatcher(inter_node, inner=DeduplicatedAllToAllDispatcher(intra_node))


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
        y = all_to_all(y, group=self.group, input_splits=self.receive_sizes, output_splits=self.send_sizes)
        return unpermute_sum(y, edges=self.edges)


@dataclass(frozen=True, slots=True)
class _NestedHandle:
    inner: DispatchHandle
    outer: _DeduplicatedRows

    def combine(self, y: Float[Tensor, "R D"]) -> Float[Tensor, "T D"]:
        return self.outer.combine(self.inner.combine(y))


def _dispatch_deduplicated(x: Float[Tensor, "T D"], *, routing: Routing, group: Group) -> _DeduplicatedRows:
    places = group_size(group)
    if routing.num_experts % places:
        raise ValueError(
            f"{routing.num_experts} experts cannot be split evenly over {places} ranks"
        )
    each = routing.num_experts // places
    place = routing.expert // each  # that of a dropped edge is ``places``
    first = _first_occurrence(routing.token * (places + 1) + place, keys=routing.num_tokens * (places + 1))
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
    out = {"group": group, "sent": trip.edges_sent, "received": trip.edges_received}
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
