"""Dispatchers carry token rows to their experts and bring them home.

A dispatcher holds groups of ranks, never tensors: what ``combine`` needs from ``dispatch`` travels
in the ``DispatchedRows``, so recomputation and overlapping micro-batches are safe. Where experts live on
other ranks, ``dispatch_far.py`` goes there.

Letters: T tokens, N edges, R rows received, D model dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.routing import Routing
from moesaic.ops.moe_kernel import Edges, permute_tokens, unpermute_tokens
from moesaic.ops.permute import RowGroups, group_by_expert


@runtime_checkable
class DispatchHandle(Protocol):
    """The way home of a parcel's rows, once they are answers."""

    def combine(self, y: Float[Tensor, "R D"]) -> Float[Tensor, "T D"]:
        """Return each token's weighted sum of its answers."""
        ...


@dataclass(frozen=True, slots=True)
class DispatchedRows:
    """Rows sorted by local expert (``groups`` says where each starts), and the way home."""

    rows: Float[Tensor, "R D"]
    groups: RowGroups
    handle: DispatchHandle


@runtime_checkable
class ExpertCompute(Protocol):
    """What a dispatcher asks of experts: answer sorted rows, or take the whole way at once."""

    def __call__(
        self, rows: Float[Tensor, "R D"], *, groups: RowGroups
    ) -> Float[Tensor, "R D"]: ...

    def forward_edges(self, x: Float[Tensor, "T D"], *, edges: Edges) -> Float[Tensor, "T D"]: ...

    def in_one_call(
        self, x: Float[Tensor, "T D"], *, function: Callable[[Tensor, "ExpertCompute"], Tensor]
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

    def run_experts(
        self, x: Float[Tensor, "T D"], *, routing: Routing, experts: ExpertCompute
    ) -> Float[Tensor, "T D"]: ...

    def dispatch(self, x: Float[Tensor, "T D"], routing: Routing) -> DispatchedRows: ...

    def combine(
        self, y: Float[Tensor, "R D"], dispatched: DispatchedRows
    ) -> Float[Tensor, "T D"]: ...


class LocalDispatcher:
    """Every expert lives here: sorting is the whole job, and the rest may be one operation."""

    def run_experts(
        self, x: Float[Tensor, "T D"], *, routing: Routing, experts: ExpertCompute
    ) -> Float[Tensor, "T D"]:
        return experts.forward_edges(x, edges=sort_edges(routing))

    def dispatch(self, x: Float[Tensor, "T D"], routing: Routing) -> DispatchedRows:
        edges = sort_edges(routing)
        return DispatchedRows(permute_tokens(x, edges=edges), edges.groups, LocalHandle(edges))

    def combine(self, y: Float[Tensor, "R D"], dispatched: DispatchedRows) -> Float[Tensor, "T D"]:
        return dispatched.handle.combine(y)


@dataclass(frozen=True, slots=True)
class LocalHandle:
    """Rows that never left: weigh each by its edge, add it to its token."""

    edges: Edges

    def combine(self, y: Float[Tensor, "R D"]) -> Float[Tensor, "T D"]:
        return unpermute_tokens(y, edges=self.edges)


def sort_edges(routing: Routing) -> Edges:
    """Return the edges of a routing with their order by expert."""
    groups = group_by_expert(routing.expert, num_experts=routing.num_experts)
    return Edges(routing.token, routing.weight, groups, routing.num_tokens, routing.per_token)


def apply_experts(
    rows: Float[Tensor, "R D"], *, groups: RowGroups, experts: ExpertCompute
) -> Float[Tensor, "R D"]:
    """Return the experts' answers to rows that ``groups`` would sort, in the order they lie in.

    By definition: sort, ask, sort back; experts that can do it in one go do.
    """
    count = rows.shape[0]
    once = torch.ones(count, dtype=torch.float32, device=rows.device)
    every = torch.arange(count, device=rows.device)
    return experts.forward_edges(rows, edges=Edges(every, once, groups, count, 1))
