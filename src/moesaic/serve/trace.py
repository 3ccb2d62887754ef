"""Trace: which experts read and wrote a sentence, layer by layer, token by token."""

from dataclasses import dataclass
from typing import Any

from moesaic.core.shapes import Tensor
from moesaic.moe.record import RoutingRecord


@dataclass(frozen=True, slots=True)
class RoutedExpert:
    """An edge of a token: its expert and the weight the router gave it."""

    expert: int
    weight: float


@dataclass(frozen=True, slots=True)
class TracedSide:
    """One side of a translation: tokens as text and, per MoE layer, the visits of each token.

    A token whose edges were all dropped has no visits.
    """

    tokens: tuple[str, ...]
    layers: dict[str, tuple[tuple[RoutedExpert, ...], ...]]

    def plain(self) -> dict[str, Any]:
        """Return what summary.json holds: ``[[expert, weight], ...]`` per layer and token."""
        layers = {
            name: [[[v.expert, round(v.weight, 3)] for v in visits] for visits in rows]
            for name, rows in self.layers.items()
        }
        return {"tokens": list(self.tokens), "layers": layers}


@dataclass(frozen=True, slots=True)
class ExpertTrace:
    """The encoder's and the decoder's side. A decoder-only model has its prompt on ``target``."""

    source: TracedSide
    target: TracedSide

    def plain(self) -> dict[str, Any]:
        return {"source": self.source.plain(), "target": self.target.plain()}


def routed_experts(record: RoutingRecord) -> tuple[tuple[RoutedExpert, ...], ...]:
    """Return the kept edges of every token, heaviest first."""
    routing = record.routing
    rows: list[list[RoutedExpert]] = [[] for _ in range(routing.num_tokens)]
    columns = (_to_list(routing.token), _to_list(routing.expert), _to_list(routing.weight))
    for token, expert, weight in zip(*columns, strict=True):
        if expert < routing.num_experts:
            rows[int(token)].append(RoutedExpert(int(expert), float(weight)))
    return tuple(tuple(sorted(row, key=lambda v: -v.weight)) for row in rows)


def _to_list(tensor: Tensor) -> list[float]:
    return tensor.detach().float().tolist() if tensor.is_floating_point() else tensor.tolist()
