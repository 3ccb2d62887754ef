"""Dispatchers carry token rows to their experts and bring them home.

A dispatcher holds groups of ranks, never tensors: what ``combine`` needs from ``dispatch`` travels
in the ``Parcel``, so recomputation and overlapping micro-batches are safe. Where experts live on
other ranks, ``dispatch_far.py`` goes there.

Letters: T tokens, N edges, R rows received, D model dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.routing import Routing
from moesaic.ops.group import Groups, group
from moesaic.ops.mixture import Edges, carry_home, carry_out


@runtime_checkable
class Way(Protocol):
    """The way home of a parcel's rows, once they are answers."""

    def home(self, y: Float[Tensor, "R D"]) -> Float[Tensor, "T D"]:
        """Return each token's weighted sum of its answers."""
        ...


@dataclass(frozen=True, slots=True)
class Parcel:
    """Rows sorted by local expert (``groups`` says where each starts), and the way home."""

    rows: Float[Tensor, "R D"]
    groups: Groups
    way: Way


@runtime_checkable
class RowExperts(Protocol):
    """What a dispatcher asks of experts: answer sorted rows, or take the whole way at once."""

    def __call__(self, rows: Float[Tensor, "R D"], *, groups: Groups) -> Float[Tensor, "R D"]: ...

    def mix(self, x: Float[Tensor, "T D"], *, edges: Edges) -> Float[Tensor, "T D"]: ...

    def within(
        self, x: Float[Tensor, "T D"], *, work: Callable[[Tensor, "RowExperts"], Tensor]
    ) -> Float[Tensor, "T D"]:
        """Return ``work(x, experts)``, which may ask them many times.

        To whoever gathers their parameters when they are asked, it is once.
        """
        ...


@runtime_checkable
class Dispatcher(Protocol):
    """Brings rows to where their expert lives, and results back.

    ``carry`` is the whole way; by definition ``combine(experts(dispatch(x)))``.
    """

    def carry(
        self, x: Float[Tensor, "T D"], *, routing: Routing, experts: RowExperts
    ) -> Float[Tensor, "T D"]: ...

    def dispatch(self, x: Float[Tensor, "T D"], routing: Routing) -> Parcel: ...

    def combine(self, y: Float[Tensor, "R D"], parcel: Parcel) -> Float[Tensor, "T D"]: ...


class LocalDispatcher:
    """Every expert lives here: sorting is the whole job, and the rest may be one operation."""

    def carry(
        self, x: Float[Tensor, "T D"], *, routing: Routing, experts: RowExperts
    ) -> Float[Tensor, "T D"]:
        return experts.mix(x, edges=edges_of(routing))

    def dispatch(self, x: Float[Tensor, "T D"], routing: Routing) -> Parcel:
        edges = edges_of(routing)
        return Parcel(carry_out(x, edges=edges), edges.groups, Here(edges))

    def combine(self, y: Float[Tensor, "R D"], parcel: Parcel) -> Float[Tensor, "T D"]:
        return parcel.way.home(y)


@dataclass(frozen=True, slots=True)
class Here:
    """Rows that never left: weigh each by its edge, add it to its token."""

    edges: Edges

    def home(self, y: Float[Tensor, "R D"]) -> Float[Tensor, "T D"]:
        return carry_home(y, edges=self.edges)


def edges_of(routing: Routing) -> Edges:
    """Return the edges of a routing with their order by expert."""
    groups = group(routing.expert, num_experts=routing.num_experts)
    return Edges(routing.token, routing.weight, groups, routing.num_tokens, routing.per_token)


def answer(
    rows: Float[Tensor, "R D"], *, groups: Groups, experts: RowExperts
) -> Float[Tensor, "R D"]:
    """Return the experts' answers to rows that ``groups`` would sort, in the order they lie in.

    By definition: sort, ask, sort back; experts that can do it in one go do.
    """
    count = rows.shape[0]
    once = torch.ones(count, dtype=torch.float32, device=rows.device)
    every = torch.arange(count, device=rows.device)
    return experts.mix(rows, edges=Edges(every, once, groups, count, 1))
