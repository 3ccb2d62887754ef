"""All-to-all dispatchers: experts are split over ranks, and token rows are exchanged.

Of a group of n ranks, rank r holds the experts [r*E/n, (r+1)*E/n) (Lepikhin et al. 2021, GShard,
arXiv:2006.16668). Expert tensor parallelism may also split each expert along its hidden width over
the ranks of a slice group: these receive the same rows, and their partial outputs are added (Liu
et al. 2025, MoE Parallel Folding, arXiv:2504.14960). Rows are sent in the dtype in which experts
compute.

Letters: T tokens, N edges, E experts of all ranks, e experts of a rank, S rows sent, R rows
received, P ranks of a group, D model dim.
"""

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.distributed.collectives import all_gather_rows, all_to_all, reduce_scatter_rows
from moesaic.distributed.process_groups import Group, group_rank, group_size
from moesaic.moe.dispatcher import (
    Dispatcher,
    ExpertCompute,
    LocalDispatcher,
    apply_experts,
    sort_edges,
)
from moesaic.moe.routing import Routing
from moesaic.ops.autocast import as_autocast
from moesaic.ops.moe_kernel import Edges, permute_tokens, unpermute_tokens
from moesaic.ops.permute import RowGroups, group_by_expert


class AllToAllDispatcher:
    """Expert parallelism over ``group``, expert tensor parallelism over ``slice_group``.

    The experts given to ``run_experts`` are this rank's part: E/n experts of 1/m of the hidden
    width, without a ``down`` bias where m > 1 (every slice would add it). Dropped edges are not
    sent. The host waits for the device once, to read the sizes of the exchange.
    """

    def __init__(self, group: Group, *, slice_group: Group = None) -> None:
        self._group, self._slice_group = group, slice_group

    def run_experts(
        self, x: Float[Tensor, "T D"], *, routing: Routing, experts: ExpertCompute
    ) -> Float[Tensor, "T D"]:
        if group_size(self._group) * group_size(self._slice_group) == 1:
            return LocalDispatcher().run_experts(x, routing=routing, experts=experts)
        edges = sort_edges(routing)
        plan = self._plan(edges)
        send = {"input_splits": plan.send_sizes, "output_splits": plan.receive_sizes}
        back = {"input_splits": plan.receive_sizes, "output_splits": plan.send_sizes}
        # dispatch: permute, all-to-all, gather over the slices
        rows = permute_tokens(as_autocast(x), edges=edges)[: sum(plan.send_sizes)]
        rows = all_to_all(rows, group=self._group, **send)
        rows = all_gather_rows(rows, group=self._slice_group, sizes=plan.slice_sizes)
        y = apply_experts(rows, groups=plan.groups, experts=experts)
        # combine: the same in reverse
        y = reduce_scatter_rows(y, group=self._slice_group, sizes=plan.slice_sizes)
        y = all_to_all(y, group=self._group, **back)
        return unpermute_sum(y, edges=edges)

    def _plan(self, edges: Edges) -> "_AllToAllPlan":
        """Exchange the number of rows per expert, and read the sizes on the host. Collective."""
        counts = edges.groups.rows_per_expert
        ranks, slices = group_size(self._group), group_size(self._slice_group)
        received = all_to_all_counts(counts, group=self._group)
        # one row per slice and rank, one column per expert
        table = all_gather_rows(received, group=self._slice_group, sizes=[ranks] * slices)
        sizes = torch.cat([counts.view(ranks, -1).sum(1), table.sum(1)]).tolist()
        per_slice = [tuple(sizes[ranks * (1 + cut) :][:ranks]) for cut in range(slices)]
        slice_sizes = tuple(sum(block) for block in per_slice)
        return _AllToAllPlan(
            send_sizes=tuple(sizes[:ranks]),
            receive_sizes=per_slice[group_rank(self._slice_group)],
            slice_sizes=slice_sizes,
            groups=_group_blocks_by_expert(table, rows=sum(slice_sizes)),
        )


@dataclass(frozen=True, slots=True)
class _AllToAllPlan:
    """Rows sent to and received from each rank, and rows of each rank of the slice group.

    ``groups`` sorts the received rows by expert.
    """

    send_sizes: tuple[int, ...]
    receive_sizes: tuple[int, ...]
    slice_sizes: tuple[int, ...]
    groups: RowGroups


def unpermute_sum(y: Float[Tensor, "S D"], *, edges: Edges) -> Float[Tensor, "T D"]:
    """Return each token's weighted sum of the expert outputs of its edges that were not dropped."""
    dropped = edges.groups.order.numel() - y.shape[0]
    return unpermute_tokens(F.pad(y, (0, 0, 0, dropped)) if dropped else y, edges=edges)


def all_to_all_counts(counts: Int[Tensor, "E"], *, group: Group) -> Int[Tensor, "P e"]:
    """Return the number of rows from each rank for each local expert. Collective."""
    ranks = group_size(group)
    _check_even_split(counts.numel(), ranks)
    each = [1] * ranks
    return all_to_all(counts.view(ranks, -1), group=group, input_splits=each, output_splits=each)


def _check_even_split(experts: int, ranks: int) -> None:
    if experts % ranks:
        raise ValueError(f"{experts} experts cannot be split evenly over {ranks} ranks")


def _group_blocks_by_expert(blocks: Int[Tensor, "B e"], *, rows: int) -> RowGroups:
    """Sort the rows of B blocks by expert; ``blocks`` holds the counts of sorted blocks."""
    index = torch.arange(blocks.shape[1], device=blocks.device).repeat(blocks.shape[0])
    expert = index.repeat_interleave(blocks.flatten(), output_size=rows)
    return group_by_expert(expert, num_experts=blocks.shape[1])


def hierarchical_dispatcher(*, inter_node: Group, intra_node: Group) -> Dispatcher:
    """Return the hierarchical all-to-all: first between nodes, then inside a node.

    ``inter_node`` holds the ranks with one local rank on every node; experts are split over (node,
    local rank), in order. Each link between nodes carries a token once per node (Hwang et al.
    2023, Tutel, arXiv:2206.03382, has the two steps; the deduplication of the first is ours).
    """
    inner = DeduplicatedAllToAllDispatcher(intra_node)
    return DeduplicatedAllToAllDispatcher(inter_node, inner=inner)


class DeduplicatedAllToAllDispatcher:
    """All-to-all that sends a token to a rank once, however many of its experts are there.

    The token's edges are sent with its row. ``inner`` dispatches from there, by default to experts
    on the rank itself; one row per token and rank comes back, summed there and rounded to the
    dtype of the rows. The host waits for the device once.
    """

    def __init__(self, group: Group, *, inner: Dispatcher | None = None) -> None:
        self._group, self._inner = group, inner or LocalDispatcher()

    def run_experts(
        self, x: Float[Tensor, "T D"], *, routing: Routing, experts: ExpertCompute
    ) -> Float[Tensor, "T D"]:
        group = self._group
        if group_size(group) == 1:
            return self._inner.run_experts(x, routing=routing, experts=experts)
        unique = _unique_edges(routing, ranks=group_size(group))
        sizes = _ExchangedSizes.exchange(unique, group=group)
        rows = permute_tokens(as_autocast(x), edges=unique.rows)[: sum(sizes.rows_sent)]
        rows = all_to_all(
            rows, group=group, input_splits=sizes.rows_sent, output_splits=sizes.rows_received
        )
        local = _exchange_edges(routing, unique, sizes=sizes, num_rows=len(rows), group=group)
        y = self._inner.run_experts(rows, routing=local, experts=experts)
        y = all_to_all(
            y, group=group, input_splits=sizes.rows_received, output_splits=sizes.rows_sent
        )
        return unpermute_sum(y, edges=unique.rows)


@dataclass(frozen=True, slots=True)
class _UniqueEdges:
    """The edges of a routing by rank, and the unique (token, rank) pairs among them.

    ``rows`` has weight one and a dropped edge for each duplicate; ``by_rank`` sorts all edges by
    the rank of their expert. ``first`` is, for each edge, the first one of the same pair.
    """

    rows: Edges
    by_rank: RowGroups
    rank: Int[Tensor, "N"]
    first: Int[Tensor, "N"]
    experts_per_rank: int


def _unique_edges(routing: Routing, *, ranks: int) -> _UniqueEdges:
    _check_even_split(routing.num_experts, ranks)
    each = routing.num_experts // ranks
    rank = routing.expert // each  # a dropped edge has rank ``ranks``
    pair = routing.token * (ranks + 1) + rank
    index = torch.arange(pair.numel(), device=pair.device)
    first = torch.full((routing.num_tokens * (ranks + 1),), pair.numel(), device=pair.device)
    first = first.scatter_reduce_(0, pair, index, "amin")[pair]
    rows = replace(
        routing,
        expert=torch.where(first == index, rank, ranks),
        weight=torch.ones_like(routing.weight, dtype=torch.float32).detach(),
        num_experts=ranks,
    )
    by_rank = group_by_expert(rank, num_experts=ranks)
    return _UniqueEdges(sort_edges(rows), by_rank, rank, first, each)


@dataclass(frozen=True, slots=True)
class _ExchangedSizes:
    """Rows and edges sent to and received from each rank."""

    rows_sent: tuple[int, ...]
    edges_sent: tuple[int, ...]
    rows_received: tuple[int, ...]
    edges_received: tuple[int, ...]

    @staticmethod
    def exchange(unique: _UniqueEdges, *, group: Group) -> "_ExchangedSizes":
        """Exchange the sizes and read them on the host. Collective."""
        counts = [unique.rows.groups.rows_per_expert, unique.by_rank.rows_per_expert]
        sent = torch.stack(counts, 1)
        each = [1] * len(sent)
        received = all_to_all(sent, group=group, input_splits=each, output_splits=each)
        sizes = torch.cat([sent, received], 1).t().tolist()
        return _ExchangedSizes(*(tuple(line) for line in sizes))

    def row_offsets(self, edges: Int[Tensor, "N"]) -> Int[Tensor, "N"]:
        """Return, for each received edge, the number of rows from the ranks before its own."""
        starts = torch.tensor([0, *accumulate(self.rows_received)][:-1], device=edges.device)
        lengths = torch.tensor(self.edges_received, device=edges.device)
        return starts.repeat_interleave(lengths, output_size=edges.numel())


def _exchange_edges(
    routing: Routing,
    unique: _UniqueEdges,
    *,
    sizes: _ExchangedSizes,
    num_rows: int,
    group: Group,
) -> Routing:
    """Return the routing of the received rows over this rank's experts. Collective."""
    groups, each = unique.rows.groups, unique.experts_per_rank
    starts = groups.offsets - groups.rows_per_expert
    live = unique.by_rank.order[: sum(sizes.edges_sent)]
    row = groups.inverse[unique.first[live]] - starts[unique.rank[live]]  # among those of its rank
    address = row * each + routing.expert[live] % each
    splits = {"input_splits": sizes.edges_sent, "output_splits": sizes.edges_received}
    address = all_to_all(address, group=group, **splits)
    weight = all_to_all(routing.weight[live], group=group, **splits)
    token = address // each + sizes.row_offsets(address)
    return Routing(token, address % each, weight, num_rows, each)
