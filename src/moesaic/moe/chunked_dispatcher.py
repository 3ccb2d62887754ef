"""Chunked all-to-all: experts compute on one chunk of rows while the next is being sent.

The rows of every expert are split into pieces, so each piece has rows of all experts and the router
runs once (Hwang et al. 2023, Tutel, arXiv:2206.03382). A chunk is one all-to-all and holds one or
more pieces; the forward and backward passes may have different numbers of chunks (Pan et al. 2025,
FSMoE, arXiv:2501.10714; ``benchmarks/chunk_schedule.py`` chooses them). Experts compute piece by
piece; the number of pieces is a multiple of both numbers of chunks.

Four autograd functions share the ``_OverlappedTransfers`` of a layer: send and receive of dispatch,
send and receive of combine. Their backward passes run the transfers in reverse order, so chunks
overlap there, too.

Letters: N edges that are not dropped, E experts, e experts of a rank, P ranks, C pieces, R rows
received, D model dim, M cells (rank, piece, expert).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import lcm
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.distributed.collectives import AsyncRows, all_to_all_async
from moesaic.distributed.process_groups import Group, group_size
from moesaic.moe.all_to_all_dispatcher import AllToAllDispatcher, all_to_all_counts, unpermute_sum
from moesaic.moe.dispatcher import ExpertCompute, apply_experts, sort_edges
from moesaic.moe.routing import Routing
from moesaic.ops.autocast import as_autocast
from moesaic.ops.moe_kernel import permute_tokens
from moesaic.ops.permute import RowGroups


@dataclass(frozen=True, slots=True)
class OverlapDegrees:
    """The number of chunks of each all-to-all in the forward and in the backward pass."""

    forward: int = 1
    backward: int = 1

    def __post_init__(self) -> None:
        if min(self.forward, self.backward) < 1:
            raise ValueError(f"each all-to-all has at least one chunk, not {self}")

    @property
    def num_pieces(self) -> int:
        return lcm(self.forward, self.backward)


class ChunkedAllToAllDispatcher:
    """An ``AllToAllDispatcher`` that overlaps communication and computation."""

    def __init__(self, group: Group, *, degrees: OverlapDegrees) -> None:
        self._group, self._degrees = group, degrees

    def run_experts(
        self, x: Float[Tensor, "T D"], *, routing: Routing, experts: ExpertCompute
    ) -> Float[Tensor, "T D"]:
        if group_size(self._group) == 1 or self._degrees.num_pieces == 1:
            return AllToAllDispatcher(self._group).run_experts(x, routing=routing, experts=experts)
        edges = sort_edges(routing)
        plan = _chunk_plan(edges.groups.rows_per_expert, group=self._group, degrees=self._degrees)
        rows = permute_tokens(as_autocast(x), edges=edges)[: plan.num_sent]

        def run_pieces(rows: Tensor, experts: ExpertCompute) -> Tensor:
            transfers = _OverlappedTransfers(plan)
            token, sent = _SendDispatch.apply(rows, transfers), []
            for piece, groups in enumerate(plan.groups):
                received = _ReceiveDispatch.apply(token, transfers, piece)
                y = apply_experts(received, groups=groups, experts=experts)
                sent.append(_SendCombine.apply(y, transfers, piece))
            return _ReceiveCombine.apply(transfers, *sent)

        return unpermute_sum(experts.in_one_call(rows, function=run_pieces), edges=edges)


@dataclass(frozen=True, slots=True)
class _ChunkLayout:
    """The order of rows in the chunks of one pass, and the rows per rank of each chunk.

    ``order[j]`` is the index, among rows sorted by expert, of the j-th row sent; ``piece_rows[c]``
    are the indices of piece c, sorted by expert, in its received chunk.
    """

    send_sizes: tuple[tuple[int, ...], ...]
    receive_sizes: tuple[tuple[int, ...], ...]
    order: Int[Tensor, "N"]
    piece_rows: tuple[Int[Tensor, "R"], ...]

    @property
    def pieces_per_chunk(self) -> int:
        return len(self.piece_rows) // len(self.send_sizes)


@dataclass(frozen=True, slots=True)
class _ChunkPlan:
    group: Group
    forward: _ChunkLayout
    backward: _ChunkLayout
    groups: tuple[RowGroups, ...]
    num_sent: int


class _ChunkedTransfer:
    """The chunks of one direction: sent once complete, waited for when needed."""

    def __init__(self, group: Group, layout: _ChunkLayout, *, reverse: bool) -> None:
        self._group, self._layout, self._reverse = group, layout, reverse
        self._partial_chunks: dict[int, Tensor] = {}
        chunks = range(len(layout.send_sizes))
        self._missing_pieces = dict.fromkeys(chunks, layout.pieces_per_chunk)
        self._pending: dict[int, AsyncRows] = {}
        self._received: dict[int, Tensor] = {}

    def send_chunk(self, chunk: int, rows: Tensor) -> None:
        sent, received = self._layout.send_sizes[chunk], self._layout.receive_sizes[chunk]
        if self._reverse:
            sent, received = received, sent
        self._pending[chunk] = all_to_all_async(
            rows, group=self._group, input_splits=sent, output_splits=received
        )

    def send_all(self, rows: Tensor, *, last_first: bool = False) -> None:
        """Send all rows, given sorted by expert, from their own rank."""
        sizes = [sum(sent) for sent in self._layout.send_sizes]
        chunks = list(enumerate(rows.index_select(0, self._layout.order).split(sizes)))
        for chunk, part in reversed(chunks) if last_first else chunks:
            self.send_chunk(chunk, part)

    def send_piece(self, piece: int, rows: Tensor) -> None:
        """Add a piece from the experts' rank; its chunk is sent with the last piece."""
        chunk = piece // self._layout.pieces_per_chunk
        if chunk not in self._partial_chunks:
            count = sum(self._layout.receive_sizes[chunk])
            self._partial_chunks[chunk] = rows.new_empty(count, rows.shape[1])
        self._partial_chunks[chunk].index_copy_(0, self._layout.piece_rows[piece], rows)
        self._missing_pieces[chunk] -= 1
        if not self._missing_pieces[chunk]:
            self.send_chunk(chunk, self._partial_chunks.pop(chunk))

    def receive_piece(self, piece: int) -> Tensor:
        """Return a piece, sorted by expert, on the experts' rank; the last one frees its chunk."""
        chunk = piece // self._layout.pieces_per_chunk
        if chunk not in self._received:
            self._received[chunk] = self._pending.pop(chunk).wait()
        self._missing_pieces[chunk] -= 1
        rows = self._received[chunk] if self._missing_pieces[chunk] else self._received.pop(chunk)
        return rows.index_select(0, self._layout.piece_rows[piece])

    def receive_all(self) -> Tensor:
        """Return all rows, sorted by expert, on their own rank."""
        chunks = range(len(self._layout.send_sizes))
        rows = torch.cat([self._pending.pop(chunk).wait() for chunk in chunks])
        return torch.empty_like(rows).index_copy_(0, self._layout.order, rows)


class _OverlappedTransfers:
    """The transfers of one layer in both passes, shared by its four autograd functions."""

    def __init__(self, plan: _ChunkPlan) -> None:
        self.dispatch = _ChunkedTransfer(plan.group, plan.forward, reverse=False)
        self.combine = _ChunkedTransfer(plan.group, plan.forward, reverse=True)
        self.combine_grad = _ChunkedTransfer(plan.group, plan.backward, reverse=False)
        self.dispatch_grad = _ChunkedTransfer(plan.group, plan.backward, reverse=True)


class _SendDispatch(torch.autograd.Function):
    """Sends all rows. Returns an empty value that connects the pieces in the autograd graph."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfers: _OverlappedTransfers) -> Tensor:
        ctx.transfers = transfers
        transfers.dispatch.send_all(rows)
        return rows.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: ARG004  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.transfers.dispatch_grad.receive_all(), None


class _ReceiveDispatch(torch.autograd.Function):
    """Receives a piece on the experts' rank."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, transfers: _OverlappedTransfers, piece: int) -> Tensor:  # noqa: ARG004
        ctx.transfers, ctx.piece = transfers, piece
        return transfers.dispatch.receive_piece(piece)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.transfers.dispatch_grad.send_piece(ctx.piece, grads[0])
        return grads[0].new_zeros(()), None, None


class _SendCombine(torch.autograd.Function):
    """Sends the expert outputs of a piece back."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, transfers: _OverlappedTransfers, piece: int) -> Tensor:
        ctx.transfers, ctx.piece = transfers, piece
        transfers.combine.send_piece(piece, y)
        return y.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: ARG004  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.transfers.combine_grad.receive_piece(ctx.piece), None, None


class _ReceiveCombine(torch.autograd.Function):
    """Receives all expert outputs, sorted by expert."""

    @staticmethod
    def forward(ctx: Any, transfers: _OverlappedTransfers, *tokens: Tensor) -> Tensor:
        ctx.transfers, ctx.num_pieces = transfers, len(tokens)
        return transfers.combine.receive_all()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        # autograd runs the pieces from the last to the first
        ctx.transfers.combine_grad.send_all(grads[0], last_first=True)
        return None, *[grads[0].new_zeros(())] * ctx.num_pieces


def _chunk_plan(counts: Int[Tensor, "E"], *, group: Group, degrees: OverlapDegrees) -> _ChunkPlan:
    """Exchange the counts, and read them on the host once. Collective."""
    incoming = all_to_all_counts(counts, group=group)
    ranks, experts = incoming.shape
    both = torch.stack([counts.view(ranks, experts), incoming])  # [sent and received, rank, expert]
    cells = _split_counts(both, pieces=degrees.num_pieces)
    host = cells.cpu()
    forward = _chunk_layout(cells, host=host, chunks=degrees.forward)
    backward = _chunk_layout(cells, host=host, chunks=degrees.backward)
    # rows of each expert in each received piece, which is sorted by expert
    per_piece = cells[1].sum(0).t()
    groups = tuple(
        _sorted_groups(per_expert, rows=int(rows))
        for per_expert, rows in zip(per_piece, host[1].sum((0, 1)), strict=True)
    )
    return _ChunkPlan(group, forward, backward, groups, int(host[0].sum()))


def _split_counts(counts: Int[Tensor, "*B"], *, pieces: int) -> Int[Tensor, "*B C"]:
    """Split every count into nearly equal ``pieces``, the same on sender and receiver."""
    ends = counts[..., None] * torch.arange(pieces + 1, device=counts.device) // pieces
    return ends.diff()


def _sorted_groups(counts: Int[Tensor, "e"], *, rows: int) -> RowGroups:
    index = torch.arange(rows, device=counts.device)
    return RowGroups(index, index, counts, counts.cumsum(0).to(torch.int32))


def _chunk_layout(
    cells: Int[Tensor, "2 P e C"], *, host: Int[Tensor, "2 P e C"], chunks: int
) -> _ChunkLayout:
    """Order the cells of a message by chunk, rank, piece of the chunk, and expert."""
    _, ranks, experts, pieces = cells.shape
    per_chunk = pieces // chunks
    split = (ranks, experts, chunks, per_chunk)
    index = torch.arange(cells[0].numel(), device=cells.device)
    message = index.view(split).permute(2, 0, 3, 1).flatten()
    sent, received = host.view(2, *split).sum((2, 4)).transpose(1, 2).tolist()
    order = _reorder_index(cells[0].flatten(), to=message, rows=int(host[0].sum()))
    by_piece = index.view(chunks, ranks, per_chunk, experts).permute(0, 2, 3, 1).flatten()
    rows = _reorder_index(cells[1].flatten()[message], to=by_piece, rows=int(host[1].sum()))
    per_piece = rows.split(host[1].sum((0, 1)).tolist())
    starts = [0, *accumulate(sum(chunk) for chunk in received)]
    piece_rows = tuple(part - starts[c // per_chunk] for c, part in enumerate(per_piece))
    return _ChunkLayout(_tuples(sent), _tuples(received), order, piece_rows)


def _reorder_index(
    counts: Int[Tensor, "M"], *, to: Int[Tensor, "M"], rows: int
) -> Int[Tensor, "N"]:
    """Return the index that reorders rows, stored cell by cell, to another order of the cells."""
    starts = counts.cumsum(0) - counts
    lengths = counts[to]
    shift = starts[to] - (lengths.cumsum(0) - lengths)
    return torch.arange(rows, device=counts.device) + shift.repeat_interleave(
        lengths, output_size=rows
    )


def _tuples(table: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(line) for line in table)
