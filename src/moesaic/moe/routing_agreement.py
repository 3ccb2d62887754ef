"""Agreement: how alike two models, or two checkpoints, route the same tokens.

Letters: T tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

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


@dataclass(frozen=True, slots=True)
class LayerRoutingAgreement:
    """``edges`` is the share of edges that both have; ``tokens`` that of tokens with all alike.

    Of kept edges, against those of the side that has more; the order of choices does not count.
    """

    layer: str
    edges: float
    tokens: float


@dataclass(frozen=True, slots=True)
class RoutingAgreement:
    """``tokens`` is the share of tokens routed alike in every layer of their side."""

    layers: tuple[LayerRoutingAgreement, ...]
    tokens: float

    @property
    def edges(self) -> float:
        """The mean over layers."""
        shares = [layer.edges for layer in self.layers]
        return sum(shares) / max(len(shares), 1)


@dataclass(slots=True)
class RoutingComparison:
    """Adds up batch after batch: ``add`` the routes of both sides, then read ``result()``."""

    _layers: dict[str, _MatchCounts] = field(default_factory=dict)
    _sides: _MatchCounts = field(default_factory=_MatchCounts)

    def add(self, left: Sequence[LayerRoutes], right: Sequence[LayerRoutes]) -> None:
        """Compare one batch. Raises DataError unless layers and tokens are the same."""
        others = {found.layer: found for found in right}
        alike: dict[str, Tensor] = {}
        for one in left:
            other = others.get(one.layer)
            if other is None or not one.tokens.equal(other.tokens):
                raise DataError(
                    f"layer {one.layer}: the two routed other tokens; record both on the same text"
                )
            same, edges, tokens = _count_matches(one.routing, other.routing)
            sums = self._layers.setdefault(one.layer, _MatchCounts())
            sums.same, sums.edges = sums.same + same, sums.edges + edges
            sums.tokens += tokens.numel()
            sums.tokens_same += int(tokens.sum())
            alike[one.side] = alike[one.side] & tokens if one.side in alike else tokens
        self._sides.tokens += sum(tokens.numel() for tokens in alike.values())
        self._sides.tokens_same += sum(int(tokens.sum()) for tokens in alike.values())

    def result(self) -> RoutingAgreement:
        """Return the shares so far."""
        layers = tuple(
            LayerRoutingAgreement(name, sums.same / max(sums.edges, 1), _matching_share(sums))
            for name, sums in self._layers.items()
        )
        return RoutingAgreement(layers, _matching_share(self._sides))


def compare_routes(
    left: Iterable[Sequence[LayerRoutes]], right: Iterable[Sequence[LayerRoutes]]
) -> RoutingAgreement:
    """Compare two records batch by batch. Raises DataError where they are of other text."""
    comparison = RoutingComparison()
    try:
        for one, other in zip(left, right, strict=True):
            comparison.add(one, other)
    except ValueError as error:
        raise DataError("one of the two has more batches; record both on the same text") from error
    return comparison.result()


def _count_matches(one: Routing, other: Routing) -> tuple[int, int, Bool[Tensor, "T"]]:
    """Return edges in both, edges of the fuller side, and which tokens have the same."""
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
