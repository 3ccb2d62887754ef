"""Chunked: rows travel in chunks, and experts work on one while the next is on its way.

The rows of every expert's segment are cut into pieces, so each piece is a small copy of the whole
and the router is asked once (Hwang et al. 2023, Tutel, arXiv:2206.03382). A chunk is what travels
at once, one piece or several: the way forward and the way back may want chunks of different number
(Pan et al. 2025, FSMoE, arXiv:2501.10714); ``Degrees.fastest`` chooses them. Experts work piece by
piece, of which there are as many as both ways can be made of.

Four small autograd functions share a ``_Flight``: one leaves home, one lands a piece on the far
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
from moesaic.dist.collectives import Group, AsyncRows, group_size, all_to_all_async
from moesaic.dist.degrees import LayerCost, best_num_chunks
from moesaic.moe.dispatch import RowExperts, answer, edges_of
from moesaic.moe.dispatch_far import AllToAllDispatcher, exchange_counts, settle
from moesaic.moe.experts import as_autocast
from moesaic.moe.routing import Routing
from moesaic.ops.group import Groups
from moesaic.ops.mixture import carry_out


@dataclass(frozen=True, slots=True)
class Degrees:
    """In how many chunks rows travel, each way out and home: in the forward and backward pass."""

    forward: int = 1
    backward: int = 1

    def __post_init__(self) -> None:
        if min(self.forward, self.backward) < 1:
            raise ValueError(f"rows travel in one chunk at least, not {self}")

    @property
    def pieces(self) -> int:
        return lcm(self.forward, self.backward)

    @staticmethod
    def fastest(forward: LayerCost, backward: LayerCost) -> "Degrees":
        """Return the degrees that the cost model finds fastest, each pass for itself."""
        return Degrees(best_num_chunks(forward), best_num_chunks(backward))


class Chunked:
    """An ``AllToAllDispatcher`` whose ``carry`` moves and computes at the same time."""

    def __init__(self, over: Group, *, degrees: Degrees) -> None:
        self._over, self._degrees = over, degrees
        self._whole = AllToAllDispatcher(over)
        self.dispatch, self.combine = self._whole.dispatch, self._whole.combine

    def carry(
        self, x: Float[Tensor, "T D"], *, routing: Routing, experts: RowExperts
    ) -> Float[Tensor, "T D"]:
        if group_size(self._over) == 1 or self._degrees.pieces == 1:
            return self._whole.carry(x, routing=routing, experts=experts)
        edges = edges_of(routing)
        plan = _plan(edges.groups.counts, over=self._over, degrees=self._degrees)
        rows = carry_out(as_autocast(x), edges=edges)[: plan.sent]

        def work(rows: Tensor, experts: RowExperts) -> Tensor:
            flight = _Flight(plan)
            out, back = _Depart.apply(rows, flight), []
            for piece, groups in enumerate(plan.groups):
                here = _Land.apply(out, flight, piece)
                y = answer(here, groups=groups, experts=experts)
                back.append(_Leave.apply(y, flight, piece))
            return _Arrive.apply(flight, *back)

        return settle(experts.within(rows, work=work), edges=edges)


@dataclass(frozen=True, slots=True)
class _Lane:
    """One pass over the wire: chunk by chunk the rows that each rank sends and receives.

    ``order[j]`` is the row, sorted by expert, that is j-th on the wire; ``places[c]`` are the
    places of piece c, sorted by expert, in its chunk on the far side.
    """

    sent: tuple[tuple[int, ...], ...]
    received: tuple[tuple[int, ...], ...]
    order: Int[Tensor, "N"]
    places: tuple[Int[Tensor, "R"], ...]

    @property
    def wide(self) -> int:
        """Pieces in a chunk."""
        return len(self.places) // len(self.sent)


@dataclass(frozen=True, slots=True)
class _Plan:
    over: Group
    forward: _Lane
    backward: _Lane
    groups: tuple[Groups, ...]
    sent: int


class _Movement:
    """Chunks of one movement, each started when it is whole and waited for when it is wanted."""

    def __init__(self, over: Group, lane: _Lane, *, homeward: bool) -> None:
        self._over, self._lane, self._homeward = over, lane, homeward
        self._filling: dict[int, Tensor] = {}
        self._missing = dict.fromkeys(range(len(lane.sent)), lane.wide)  # pieces of a chunk
        self._flying: dict[int, AsyncRows] = {}
        self._here: dict[int, Tensor] = {}

    def start(self, chunk: int, rows: Tensor) -> None:
        sent, received = self._lane.sent[chunk], self._lane.received[chunk]
        if self._homeward:
            sent, received = received, sent
        self._flying[chunk] = all_to_all_async(rows, group=self._over, input_splits=sent, output_splits=received)

    def start_all(self, rows: Tensor, *, last_first: bool = False) -> None:
        """From home: everything is there, in the order of experts."""
        every = rows.index_select(0, self._lane.order).split([sum(s) for s in self._lane.sent])
        numbers = range(len(every))
        for chunk in reversed(numbers) if last_first else numbers:
            self.start(chunk, every[chunk])

    def put(self, piece: int, rows: Tensor) -> None:
        """From the far side: a piece is ready; its chunk leaves with the last one."""
        chunk = piece // self._lane.wide
        if chunk not in self._filling:
            count = sum(self._lane.received[chunk])
            self._filling[chunk] = rows.new_empty(count, rows.shape[1])
        self._filling[chunk].index_copy_(0, self._lane.places[piece], rows)
        self._missing[chunk] -= 1
        if not self._missing[chunk]:
            self.start(chunk, self._filling.pop(chunk))

    def take(self, piece: int) -> Tensor:
        """On the far side: a piece, sorted by expert. A chunk is let go with its last one."""
        chunk = piece // self._lane.wide
        if chunk not in self._here:
            self._here[chunk] = self._flying.pop(chunk).wait()
        self._missing[chunk] -= 1
        rows = self._here[chunk] if self._missing[chunk] else self._here.pop(chunk)
        return rows.index_select(0, self._lane.places[piece])

    def take_all(self) -> Tensor:
        """At home: everything, in the order of experts."""
        numbers = range(len(self._lane.sent))
        wire = torch.cat([self._flying.pop(chunk).wait() for chunk in numbers])
        return torch.empty_like(wire).index_copy_(0, self._lane.order, wire)


class _Flight:
    """What the four functions of one journey share. It lives as long as the graph does."""

    def __init__(self, plan: _Plan) -> None:
        self.out = _Movement(plan.over, plan.forward, homeward=False)
        self.home = _Movement(plan.over, plan.forward, homeward=True)
        self.grad_out = _Movement(plan.over, plan.backward, homeward=False)
        self.grad_home = _Movement(plan.over, plan.backward, homeward=True)


class _Depart(torch.autograd.Function):
    """Rows leave home. What it returns is a thread that ties the pieces to it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.out.start_all(rows)
        return rows.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: ARG004  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.flight.grad_home.take_all(), None


class _Land(torch.autograd.Function):
    """A piece is on the far side."""

    @staticmethod
    def forward(ctx: Any, thread: Tensor, flight: _Flight, piece: int) -> Tensor:  # noqa: ARG004
        ctx.flight, ctx.piece = flight, piece
        return flight.out.take(piece)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.flight.grad_home.put(ctx.piece, grads[0])
        return grads[0].new_zeros(()), None, None


class _Leave(torch.autograd.Function):
    """The answers of a piece leave the far side."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, flight: _Flight, piece: int) -> Tensor:
        ctx.flight, ctx.piece = flight, piece
        flight.home.put(piece, y)
        return y.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: ARG004  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.flight.grad_out.take(ctx.piece), None, None


class _Arrive(torch.autograd.Function):
    """All answers are home, in the order of experts."""

    @staticmethod
    def forward(ctx: Any, flight: _Flight, *threads: Tensor) -> Tensor:
        ctx.flight, ctx.threads = flight, len(threads)
        return flight.home.take_all()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        # the engine goes through the pieces from the last to the first
        ctx.flight.grad_out.start_all(grads[0], last_first=True)
        return None, *[grads[0].new_zeros(())] * ctx.threads


def _plan(counts: Int[Tensor, "E"], *, over: Group, degrees: Degrees) -> _Plan:
    """Exchange the counts and wait once for them. Collective."""
    incoming = exchange_counts(counts, over=over)
    ranks, experts = incoming.shape
    both = torch.stack([counts.view(ranks, experts), incoming])  # [here and there, rank, expert]
    cells = _cut(both, pieces=degrees.pieces)
    known = cells.cpu()
    lanes = [
        _lane(cells, known=known, degree=degree) for degree in (degrees.forward, degrees.backward)
    ]
    # [expert, piece] of what comes here: a piece lies sorted by expert
    per_piece = cells[1].sum(0).t()
    groups = tuple(
        _sorted(of_experts, rows=int(rows))
        for of_experts, rows in zip(per_piece, known[1].sum((0, 1)), strict=True)
    )
    return _Plan(over, lanes[0], lanes[1], groups, int(known[0].sum()))


def _cut(counts: Int[Tensor, "*B"], *, pieces: int) -> Int[Tensor, "*B C"]:
    """Cut every count into ``pieces`` nearly equal ones; both sides of the wire agree on them."""
    ends = counts[..., None] * torch.arange(pieces + 1, device=counts.device) // pieces
    return ends.diff()


def _sorted(counts: Int[Tensor, "e"], *, rows: int) -> Groups:
    every = torch.arange(rows, device=counts.device)
    return Groups(every, every, counts, counts.cumsum(0).to(torch.int32))


def _lane(cells: Int[Tensor, "2 P e C"], *, known: Int[Tensor, "2 P e C"], degree: int) -> _Lane:
    """Lay cells on the wire: chunk, rank, piece of the chunk, expert."""
    _, ranks, experts, pieces = cells.shape
    split = (ranks, experts, degree, pieces // degree)
    every = torch.arange(cells[0].numel(), device=cells.device)
    wire = every.view(split).permute(2, 0, 3, 1).flatten()
    sent, received = known.view(2, *split).sum((2, 4)).transpose(1, 2).tolist()
    order = _moved(cells[0].flatten(), to=wire, rows=int(known[0].sum()))
    there = cells[1].flatten()[wire]
    by_piece = every.view(degree, ranks, pieces // degree, experts).permute(0, 2, 3, 1).flatten()
    places = _moved(there, to=by_piece, rows=int(known[1].sum()))
    each = places.split(known[1].sum((0, 1)).tolist())
    starts = torch.tensor(received).sum(1).cumsum(0).roll(1).tolist()
    starts[0] = 0
    wide = pieces // degree
    local = tuple(at - starts[piece // wide] for piece, at in enumerate(each))
    return _Lane(_tuples(sent), _tuples(received), order, local)


def _moved(counts: Int[Tensor, "M"], *, to: Int[Tensor, "M"], rows: int) -> Int[Tensor, "N"]:
    """Return the index that brings rows that lie in cells into another order of the cells."""
    starts = counts.cumsum(0) - counts
    lengths = counts[to]
    shift = starts[to] - (lengths.cumsum(0) - lengths)
    return torch.arange(rows, device=counts.device) + shift.repeat_interleave(
        lengths, output_size=rows
    )


def _tuples(table: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(line) for line in table)
