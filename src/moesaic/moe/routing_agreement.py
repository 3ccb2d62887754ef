"""Routing agreement: the share of equal edges when two models route the same tokens.

Letters: T tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from moesaic.core.errors import DataError
from moesaic.core.shapes import Bool, Tensor
from moesaic.moe.routing import Routing
from moesaic.moe.routing_record import LayerRoutes


@dataclass(slots=True)
class _MatchCounts:
    same: int = 0
    edges: int = 0
    tokens: int = 0
    tokens_same: int = 0

    def add_tokens(self, equal: Bool[Tensor, "T"]) -> None:
        self.tokens += equal.numel()
        self.tokens_same += int(equal.sum())


@dataclass(frozen=True, slots=True)
class LayerRoutingAgreement:
    """``edges`` is the share of edges in both; ``tokens`` the share of tokens with equal edges.

    Dropped edges do not count, nor does the order of choices; shares are of the larger number.
    """

    layer: str
    edges: float
    tokens: float


@dataclass(frozen=True, slots=True)
class RoutingAgreement:
    """``tokens`` is the share of tokens with equal edges in every layer of their side."""

    layers: tuple[LayerRoutingAgreement, ...]
    tokens: float

    @property
    def edges(self) -> float:
        """The mean over layers."""
        shares = [layer.edges for layer in self.layers]
        return sum(shares) / max(len(shares), 1)


def compare_routes(
    left: Iterable[Sequence[LayerRoutes]], right: Iterable[Sequence[LayerRoutes]]
) -> RoutingAgreement:
    """Compare two sequences of batches. Raises DataError if layers or tokens differ."""
    layers: dict[str, _MatchCounts] = {}
    sides = _MatchCounts()
    try:
        for one, other in zip(left, right, strict=True):
            _add_batch(one, other, layers=layers, sides=sides)
    except ValueError as error:
        raise DataError("one of the two has more batches; record both on the same text") from error
    return RoutingAgreement(
        tuple(
            LayerRoutingAgreement(name, sums.same / max(sums.edges, 1), _matching_share(sums))
            for name, sums in layers.items()
        ),
        _matching_share(sides),
    )


def _add_batch(
    left: Sequence[LayerRoutes],
    right: Sequence[LayerRoutes],
    *,
    layers: dict[str, _MatchCounts],
    sides: _MatchCounts,
) -> None:
    others = {routes.layer: routes for routes in right}
    equal: dict[str, Tensor] = {}
    for one in left:
        other = others.get(one.layer)
        if other is None or not one.tokens.equal(other.tokens):
            raise DataError(
                f"layer {one.layer}: the two have routes of other tokens; "
                "record both on the same text"
            )
        same, edges, tokens = _count_matches(one.routing, other.routing)
        sums = layers.setdefault(one.layer, _MatchCounts())
        sums.same, sums.edges = sums.same + same, sums.edges + edges
        sums.add_tokens(tokens)
        equal[one.side] = equal[one.side] & tokens if one.side in equal else tokens
    for tokens in equal.values():
        sides.add_tokens(tokens)


def _count_matches(one: Routing, other: Routing) -> tuple[int, int, Bool[Tensor, "T"]]:
    """Return the edges in both, the larger number of edges, and a mask of equal tokens."""
    experts = max(one.num_experts, other.num_experts)
    has = [_edge_mask(routing, experts) for routing in (one, other)]
    both = int((has[0] & has[1]).sum())
    most = max(int(h.sum()) for h in has)
    return both, most, (has[0] == has[1]).all(1)


def _edge_mask(routing: Routing, experts: int) -> Bool[Tensor, "T E"]:
    has = torch.zeros(routing.num_tokens, experts, dtype=torch.bool)
    kept = ~routing.dropped
    has[routing.token[kept], routing.expert[kept]] = True
    return has


def _matching_share(sums: _MatchCounts) -> float:
    return sums.tokens_same / max(sums.tokens, 1)
