"""Chunked: rows travel in chunks, and experts work on one while the next is on its way.

The rows of every expert's segment are cut into pieces, so each piece is a small copy of the whole
and the router is asked once (Hwang et al. 2023, Tutel, arXiv:2206.03382). A chunk is what travels
at once, one piece or several: the way forward and the way back may want chunks of different number
(Pan et al. 2025, FSMoE, arXiv:2501.10714); ``benchmarks/chunk_schedule.py`` chooses them. Experts work piece by
piece, of which there are as many as both ways can be made of.

Four small autograd functions share a ``_OverlappedTransfers``: one leaves home, one lands a piece on the far
side, one leaves from there and one arrives. Their backward passes are the same journey reversed, in
reversed order, so chunks overlap there as well.

Letters: N edges that lead somewhere, E experts, P ranks, C pieces, R rows received, D model dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.distributed.collectives import AsyncRows, all_to_all_async
from moesaic.distributed.process_groups import Group, group_size
from moesaic.moe.all_to_all_dispatcher import AllToAllDispatcher, all_to_all_counts, unpermute_sum
from moesaic.moe.dispatcher import ExpertCompute, apply_experts, sort_edges
from moesaic.moe.experts import as_autocast
from moesaic.moe.routing import Routing
from moesaic.ops.moe_kernel import permute_tokens
from moesaic.ops.permute import RowGroups


@dataclass(frozen=True, slots=True)
class OverlapDegrees:
    """In how many chunks rows travel, each way out and home: in the forward and backward pass."""

    forward: int = 1
    backward: int = 1

    def __post_init__(self) -> None:
        if min(self.forward, self.backward) < 1:
            raise ValueError(f"rows travel in one chunk at least, not {self}")

    @property
    def num_pieces(self) -> int:
        return lcm(self.forward, self.backward)


class ChunkedAllToAllDispatcher:
    """An ``AllToAllDispatcher`` whose ``carry`` moves and computes at the same time."""

    def __init__(self, group: Group, *, degrees: OverlapDegrees) -> None:
        self._group, self._degrees = group, degrees
        self._unchunked = AllToAllDispatcher(group)
        self.dispatch, self.combine = self._unchunked.dispatch, self._unchunked.combine

    def run_experts(
        self, x: Float[Tensor, "T D"], *, routing: Routing, experts: ExpertCompute
    ) -> Float[Tensor, "T D"]:
        if group_size(self._group) == 1 or self._degrees.num_pieces == 1:
            return self._unchunked.run_experts(x, routing=routing, experts=experts)
        edges = sort_edges(routing)
        plan = _chunk_plan(edges.groups.rows_per_expert, group=self._group, degrees=self._degrees)
        rows = permute_tokens(as_autocast(x), edges=edges)[: plan.num_sent]

        def work(rows: Tensor, experts: ExpertCompute) -> Tensor:
            flight = _OverlappedTransfers(plan)
            out, back = _SendDispatch.apply(rows, flight), []
            for piece, groups in enumerate(plan.groups):
                here = _ReceiveDispatch.apply(out, flight, piece)
                y = apply_experts(here, groups=groups, experts=experts)
                back.append(_SendCombine.apply(y, flight, piece))
            return _ReceiveCombine.apply(flight, *back)

        return unpermute_sum(experts.in_one_call(rows, function=work), edges=edges)


@dataclass(frozen=True, slots=True)
class _ChunkLayout:
    """One pass over the wire: chunk by chunk the rows that each rank sends and receives.

    ``order[j]`` is the row, sorted by expert, that is j-th on the wire; ``places[c]`` are the
    places of piece c, sorted by expert, in its chunk on the far side.
    """

    send_sizes: tuple[tuple[int, ...], ...]
    receive_sizes: tuple[tuple[int, ...], ...]
    order: Int[Tensor, "N"]
    piece_rows: tuple[Int[Tensor, "R"], ...]

    @property
    def pieces_per_chunk(self) -> int:
        """Pieces in a chunk."""
        return len(self.piece_rows) // len(self.send_sizes)


@dataclass(frozen=True, slots=True)
class _ChunkPlan:
    group: Group
    forward: _ChunkLayout
    backward: _ChunkLayout
    groups: tuple[RowGroups, ...]
    num_sent: int


class _ChunkedTransfer:
    """Chunks of one movement, each started when it is whole and waited for when it is wanted."""

    def __init__(self, group: Group, layout: _ChunkLayout, *, reverse: bool) -> None:
        self._group, self._layout, self._reverse = group, layout, reverse
        self._partial_chunks: dict[int, Tensor] = {}
        self._missing_pieces = dict.fromkeys(
            range(len(layout.send_sizes)), layout.pieces_per_chunk
        )  # pieces of a chunk
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
        """From home: everything is there, in the order of experts."""
        every = rows.index_select(0, self._layout.order).split(
            [sum(s) for s in self._layout.send_sizes]
        )
        numbers = range(len(every))
        for chunk in reversed(numbers) if last_first else numbers:
            self.send_chunk(chunk, every[chunk])

    def send_piece(self, piece: int, rows: Tensor) -> None:
        """From the far side: a piece is ready; its chunk leaves with the last one."""
        chunk = piece // self._layout.pieces_per_chunk
        if chunk not in self._partial_chunks:
            count = sum(self._layout.receive_sizes[chunk])
            self._partial_chunks[chunk] = rows.new_empty(count, rows.shape[1])
        self._partial_chunks[chunk].index_copy_(0, self._layout.piece_rows[piece], rows)
        self._missing_pieces[chunk] -= 1
        if not self._missing_pieces[chunk]:
            self.send_chunk(chunk, self._partial_chunks.pop(chunk))

    def receive_piece(self, piece: int) -> Tensor:
        """On the far side: a piece, sorted by expert. A chunk is let go with its last one."""
        chunk = piece // self._layout.pieces_per_chunk
        if chunk not in self._received:
            self._received[chunk] = self._pending.pop(chunk).wait()
        self._missing_pieces[chunk] -= 1
        rows = self._received[chunk] if self._missing_pieces[chunk] else self._received.pop(chunk)
        return rows.index_select(0, self._layout.piece_rows[piece])

    def receive_all(self) -> Tensor:
        """At home: everything, in the order of experts."""
        numbers = range(len(self._layout.send_sizes))
        wire = torch.cat([self._pending.pop(chunk).wait() for chunk in numbers])
        return torch.empty_like(wire).index_copy_(0, self._layout.order, wire)


class _OverlappedTransfers:
    """What the four functions of one journey share. It lives as long as the graph does."""

    def __init__(self, plan: _ChunkPlan) -> None:
        self.dispatch = _ChunkedTransfer(plan.group, plan.forward, reverse=False)
        self.combine = _ChunkedTransfer(plan.group, plan.forward, reverse=True)
        self.combine_grad = _ChunkedTransfer(plan.group, plan.backward, reverse=False)
        self.dispatch_grad = _ChunkedTransfer(plan.group, plan.backward, reverse=True)


class _SendDispatch(torch.autograd.Function):
    """Rows leave home. What it returns is a thread that ties the pieces to it."""

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
    """A piece is on the far side."""

    @staticmethod
    def forward(ctx: Any, thread: Tensor, transfers: _OverlappedTransfers, piece: int) -> Tensor:  # noqa: ARG004
        ctx.transfers, ctx.piece = transfers, piece
        return transfers.dispatch.receive_piece(piece)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.transfers.dispatch_grad.send_piece(ctx.piece, grads[0])
        return grads[0].new_zeros(()), None, None


class _SendCombine(torch.autograd.Function):
    """The answers of a piece leave the far side."""

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
    """All answers are home, in the order of experts."""

    @staticmethod
    def forward(ctx: Any, transfers: _OverlappedTransfers, *threads: Tensor) -> Tensor:
        ctx.transfers, ctx.threads = transfers, len(threads)
        return transfers.combine.receive_all()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        # the engine goes through the pieces from the last to the first
        ctx.transfers.combine_grad.send_all(grads[0], last_first=True)
        return None, *[grads[0].new_zeros(())] * ctx.threads


def _chunk_plan(counts: Int[Tensor, "E"], *, group: Group, degrees: OverlapDegrees) -> _ChunkPlan:
    """Exchange the counts and wait once for them. Collective."""
    incoming = all_to_all_counts(counts, group=group)
    ranks, experts = incoming.shape
    both = torch.stack([counts.view(ranks, experts), incoming])  # [here and there, rank, expert]
    cells = _split_counts(both, pieces=degrees.num_pieces)
    known = cells.cpu()
    lanes = [
        _chunk_layout(cells, known=known, degree=degree)
        for degree in (degrees.forward, degrees.backward)
    ]
    # [expert, piece] of what comes here: a piece lies sorted by expert
    per_piece = cells[1].sum(0).t()
    groups = tuple(
        _sorted_groups(of_experts, rows=int(rows))
        for of_experts, rows in zip(per_piece, known[1].sum((0, 1)), strict=True)
    )
    return _ChunkPlan(group, lanes[0], lanes[1], groups, int(known[0].sum()))


def _split_counts(counts: Int[Tensor, "*B"], *, pieces: int) -> Int[Tensor, "*B C"]:
    """Cut every count into ``pieces`` nearly equal ones; both sides of the wire agree on them."""
    ends = counts[..., None] * torch.arange(pieces + 1, device=counts.device) // pieces
    return ends.diff()


def _sorted_groups(counts: Int[Tensor, "e"], *, rows: int) -> RowGroups:
    every = torch.arange(rows, device=counts.device)
    return RowGroups(every, every, counts, counts.cumsum(0).to(torch.int32))


def _chunk_layout(
    cells: Int[Tensor, "2 P e C"], *, known: Int[Tensor, "2 P e C"], degree: int
) -> _ChunkLayout:
    """Lay cells on the wire: chunk, rank, piece of the chunk, expert."""
    _, ranks, experts, pieces = cells.shape
    split = (ranks, experts, degree, pieces // degree)
    every = torch.arange(cells[0].numel(), device=cells.device)
    wire = every.view(split).permute(2, 0, 3, 1).flatten()
    sent, received = known.view(2, *split).sum((2, 4)).transpose(1, 2).tolist()
    order = _reorder_index(cells[0].flatten(), to=wire, rows=int(known[0].sum()))
    there = cells[1].flatten()[wire]
    by_piece = every.view(degree, ranks, pieces // degree, experts).permute(0, 2, 3, 1).flatten()
    places = _reorder_index(there, to=by_piece, rows=int(known[1].sum()))
    each = places.split(known[1].sum((0, 1)).tolist())
    starts = torch.tensor(received).sum(1).cumsum(0).roll(1).tolist()
    starts[0] = 0
    wide = pieces // degree
    local = tuple(at - starts[piece // wide] for piece, at in enumerate(each))
    return _ChunkLayout(_tuples(sent), _tuples(received), order, local)


def _reorder_index(
    counts: Int[Tensor, "M"], *, to: Int[Tensor, "M"], rows: int
) -> Int[Tensor, "N"]:
    """Return the index that brings rows that lie in cells into another order of the cells."""
    starts = counts.cumsum(0) - counts
    lengths = counts[to]
    shift = starts[to] - (lengths.cumsum(0) - lengths)
    return torch.arange(rows, device=counts.device) + shift.repeat_interleave(
        lengths, output_size=rows
    )


def _tuples(table: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(line) for line in table)
