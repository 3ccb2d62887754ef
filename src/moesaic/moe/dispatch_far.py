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
from moesaic.moe.dispatch import LocalDispatcher, DispatchedRows, ExpertCompute, apply_experts, sort_edges
from moesaic.moe.experts import as_autocast
from moesaic.moe.routing import Routing
from moesaic.ops.combine import permute
from moesaic.ops.group import RowGroups, group_by_expert
from moesaic.ops.mixture import Edges, unpermute_tokens, permute_tokens


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

    def __init__(self, group: Group, *, slice_group: Group = None, host: CountReader | None = None) -> None:
        self._group, self._slice_group, self._host = group, slice_group, host or SyncCountReader()

    def run_experts(
        self, x: Float[Tensor, "T D"], *, routing: Routing, experts: ExpertCompute
    ) -> Float[Tensor, "T D"]:
        if group_size(self._group) * group_size(self._slice_group) == 1:
            return LocalDispatcher().run_experts(x, routing=routing, experts=experts)
        edges = sort_edges(routing)
        trip = self._plan(edges)
        rows = _dispatch_rows(x, edges=edges, plan=trip)
        return _combine_rows(apply_experts(rows, groups=trip.groups, experts=experts), edges=edges, plan=trip)

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
        every = all_gather_rows(incoming, group=slices, sizes=[ranks] * cuts)  # [cut and rank, expert]
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


def _dispatch_rows(x: Float[Tensor, "T D"], *, edges: Edges, plan: AllToAllPlan) -> Float[Tensor, "R D"]:
    rows = permute_tokens(as_autocast(x), edges=edges)[: sum(plan.send_sizes)]
    rows = all_to_all(rows, group=plan.group, input_splits=plan.send_sizes, output_splits=plan.receive_sizes)
    return all_gather_rows(rows, group=plan.slice_group, sizes=plan.slice_sizes)


def _combine_rows(y: Float[Tensor, "R D"], *, edges: Edges, plan: AllToAllPlan) -> Float[Tensor, "T D"]:
    y = reduce_scatter_rows(y, group=plan.slice_group, sizes=plan.slice_sizes)
    y = all_to_all(y, group=plan.group, input_splits=plan.receive_sizes, output_splits=plan.send_sizes)
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
    return sort_rows(rows, groups=replace(groups, order=groups.inverse, place=groups.order))


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
