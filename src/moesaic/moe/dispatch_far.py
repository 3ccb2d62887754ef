"""AllToAllDispatcher: experts are split over ranks, and rows travel to them and back.

Of a group of n ranks, rank r owns the experts [r*E/n, (r+1)*E/n) (Lepikhin et al. 2021, GShard,
arXiv:2006.16668). Each expert may moreover be cut along its hidden width over the ranks of a second
group: these see the same rows, and the parts of an answer are added (Liu et al. 2025,
MoE Parallel Folding, arXiv:2504.14960). Rows travel in the dtype in which experts compute.

Letters: T tokens, N edges, E experts of all ranks, S rows sent, R rows received, D model dim.
"""

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.dist.collectives import (
    Group,
    all_to_all,
    all_gather_rows,
    group_rank,
    group_size,
    reduce_scatter_rows,
)
from moesaic.moe.dispatch import LocalDispatcher, Parcel, RowExperts, answer, edges_of
from moesaic.moe.experts import as_autocast
from moesaic.moe.routing import Routing
from moesaic.ops.combine import spread
from moesaic.ops.group import Groups, group
from moesaic.ops.mixture import Edges, carry_home, carry_out


@runtime_checkable
class Host(Protocol):
    """How the host learns the numbers of rows that it has to know before they move."""

    def read(self, sums: Int[Tensor, "C"], *, edges: int, ranks: int) -> list[int]:
        """Return ``sums``: rows to or from one of so many ``ranks``, of so many ``edges`` each."""
        ...


class Waits:
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

    def __init__(self, over: Group, *, slices: Group = None, host: Host | None = None) -> None:
        self._over, self._slices, self._host = over, slices, host or Waits()

    def carry(
        self, x: Float[Tensor, "T D"], *, routing: Routing, experts: RowExperts
    ) -> Float[Tensor, "T D"]:
        if group_size(self._over) * group_size(self._slices) == 1:
            return LocalDispatcher().carry(x, routing=routing, experts=experts)
        edges = edges_of(routing)
        trip = self._plan(edges)
        rows = _go(x, edges=edges, trip=trip)
        return _return(answer(rows, groups=trip.groups, experts=experts), edges=edges, trip=trip)

    def dispatch(self, x: Float[Tensor, "T D"], routing: Routing) -> Parcel:
        edges = edges_of(routing)
        trip = self._plan(edges)
        rows = permute(_go(x, edges=edges, trip=trip), groups=trip.groups)
        return Parcel(rows, trip.groups, Far(edges, trip))

    def combine(self, y: Float[Tensor, "R D"], parcel: Parcel) -> Float[Tensor, "T D"]:
        return parcel.way.home(y)

    def _plan(self, edges: Edges) -> "Trip":
        """Exchange how many rows lead to each expert, and learn the sums. Collective."""
        over, slices, counts = self._over, self._slices, edges.groups.counts
        ranks, cuts = group_size(over), group_size(slices)
        incoming = exchange_counts(counts, over=over)
        every = all_gather_rows(incoming, group=slices, sizes=[ranks] * cuts)  # [cut and rank, expert]
        sums = torch.cat([counts.view(ranks, -1).sum(1), every.sum(1)])
        numbers = self._host.read(sums, edges=edges.token.numel(), ranks=ranks)
        sent, arrived = tuple(numbers[:ranks]), numbers[ranks:]
        blocks = [tuple(arrived[cut * ranks :][:ranks]) for cut in range(cuts)]
        shared = tuple(sum(block) for block in blocks)
        groups = by_expert(every, rows=sum(shared))
        return Trip(over, slices, sent, blocks[group_rank(slices)], shared, groups)


@dataclass(frozen=True, slots=True)
class Trip:
    """Rows per rank: sent, received, and held by each rank of ``slices``; ``groups`` sorts them."""

    over: Group
    slices: Group
    sent: tuple[int, ...]
    received: tuple[int, ...]
    shared: tuple[int, ...]
    groups: Groups


@dataclass(frozen=True, slots=True)
class Far:
    """Rows that came from other ranks: the same way back, then weighed and added at home."""

    edges: Edges
    trip: Trip

    def home(self, y: Float[Tensor, "R D"]) -> Float[Tensor, "T D"]:
        y = permute_back(y, groups=self.trip.groups)
        return _return(y, edges=self.edges, trip=self.trip)


def _go(x: Float[Tensor, "T D"], *, edges: Edges, trip: Trip) -> Float[Tensor, "R D"]:
    rows = carry_out(as_autocast(x), edges=edges)[: sum(trip.sent)]
    rows = all_to_all(rows, group=trip.over, input_splits=trip.sent, output_splits=trip.received)
    return all_gather_rows(rows, group=trip.slices, sizes=trip.shared)


def _return(y: Float[Tensor, "R D"], *, edges: Edges, trip: Trip) -> Float[Tensor, "T D"]:
    y = reduce_scatter_rows(y, group=trip.slices, sizes=trip.shared)
    y = all_to_all(y, group=trip.over, input_splits=trip.received, output_splits=trip.sent)
    return settle(y, edges=edges)


def settle(y: Float[Tensor, "S D"], *, edges: Edges) -> Float[Tensor, "T D"]:
    """Add the answers of the edges that lead somewhere to their tokens."""
    nowhere = edges.groups.order.numel() - y.shape[0]
    return carry_home(F.pad(y, (0, 0, 0, nowhere)) if nowhere else y, edges=edges)


def permute(rows: Float[Tensor, "R D"], *, groups: Groups) -> Float[Tensor, "R D"]:
    """Return rows sorted by expert; unlike an index, its backward is a gather as well."""
    return spread(rows, token=groups.order, groups=groups, per_token=1)


def permute_back(rows: Float[Tensor, "R D"], *, groups: Groups) -> Float[Tensor, "R D"]:
    """Return sorted rows in the order in which they came."""
    return permute(rows, groups=replace(groups, order=groups.place, place=groups.order))


def exchange_counts(counts: Int[Tensor, "E"], *, over: Group) -> Int[Tensor, "P e"]:
    """Return how many rows each rank has for each of the experts here. Collective."""
    ranks = group_size(over)
    if counts.numel() % ranks:
        raise ValueError(f"{counts.numel()} experts cannot be split evenly over {ranks} ranks")
    each = [1] * ranks
    return all_to_all(counts.view(ranks, -1), group=over, input_splits=each, output_splits=each)


def by_expert(blocks: Int[Tensor, "B E"], *, rows: int) -> Groups:
    """Sort rows that come in B blocks, each sorted by expert already: ``blocks`` are the counts."""
    every = torch.arange(blocks.shape[1], device=blocks.device).repeat(blocks.shape[0])
    expert = every.repeat_interleave(blocks.flatten(), output_size=rows)
    return group(expert, num_experts=blocks.shape[1])
