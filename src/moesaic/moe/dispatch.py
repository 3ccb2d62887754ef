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


@dataclass(frozen=True, slots=True)
class Parcel:
    """Rows sorted by local expert (``groups`` says where each starts), and the way home."""

    rows: Float[Tensor, "R D"]
    groups: Groups
    routing: Routing


@runtime_checkable
class Dispatcher(Protocol):
    """Brings rows to where their expert lives, and results back."""

    def dispatch(self, x: Float[Tensor, "T D"], routing: Routing) -> Parcel: ...

    def combine(self, y: Float[Tensor, "R D"], parcel: Parcel) -> Float[Tensor, "T D"]: ...


class LocalDispatcher:
    """Every expert lives here: sorting is the whole job."""

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
