"""Dispatchers carry token rows to their experts and bring them home.

A dispatcher holds groups of ranks, never tensors: what ``combine`` needs from ``dispatch`` travels
in the ``Parcel``, so recomputation and overlapping micro-batches are safe.

Letters: T tokens, N edges, R rows received, D model dim.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.routing import Routing
from moesaic.ops.combine import combine, spread
from moesaic.ops.group import Groups, group
from moesaic.ops.mixture import Edges


@dataclass(frozen=True, slots=True)
class Parcel:
    """Rows sorted by local expert (``groups`` says where each starts), and the way home."""

    rows: Float[Tensor, "R D"]
    groups: Groups
    routing: Routing


@runtime_checkable
class RowExperts(Protocol):
    """What a dispatcher asks of experts: answer sorted rows, or take the whole way at once."""

    def __call__(self, rows: Float[Tensor, "R D"], *, groups: Groups) -> Float[Tensor, "R D"]: ...

    def mix(self, x: Float[Tensor, "T D"], *, edges: Edges) -> Float[Tensor, "T D"]: ...


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
        groups = group(routing.expert, num_experts=routing.num_experts)
        edges = Edges(routing.token, routing.weight, groups, routing.num_tokens, routing.per_token)
        return experts.mix(x, edges=edges)

    def dispatch(self, x: Float[Tensor, "T D"], routing: Routing) -> Parcel:
        groups = group(routing.expert, num_experts=routing.num_experts)
        rows = spread(x, token=routing.token, groups=groups, per_token=routing.per_token)
        return Parcel(rows, groups, routing)

    def combine(self, y: Float[Tensor, "R D"], parcel: Parcel) -> Float[Tensor, "T D"]:
        routing = parcel.routing
        return combine(
            y,
            token=routing.token,
            weight=routing.weight,
            groups=parcel.groups,
            num_tokens=routing.num_tokens,
            per_token=routing.per_token,
        )
