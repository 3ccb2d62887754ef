"""Which experts read a text, and how much each language uses them.

Insight: the three findings of OpenMoE (arXiv:2402.01739), looked for in recorded routes.

Does a router read which token it is, or only where it is? Are late tokens the ones that are
dropped? (When routes settle in training is ``moe/routing_agreement.py``.) Results are plain data,
written as ``insight.json``.

Letters: N edges, E experts, P positions, V vocabulary ids.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from moesaic.core.shapes import Bool, Int, Tensor
from moesaic.data.batch import Batch
from moesaic.model.transformer import Transformer
from moesaic.moe.limit import choice_ranks, queue_positions
from moesaic.moe.routing_record import LayerRoutes, routes_from_records
from moesaic.monitor.expert_usage import UsageCounter
from moesaic.monitor.specialization import (
    characteristic_inputs,
    conditional_entropy,
    measure_specialization,
    routing_distance,
    shuffle_counts,
)
from moesaic.ops.counter_rng import hash_combine


@torch.inference_mode()
def record_routes(model: Transformer, batch: Batch) -> tuple[LayerRoutes, ...]:
    """Return how a model routes a batch when it evaluates; tokens count for the target language."""
    training = model.training
    model.eval()
    routes = routes_from_records(model(batch).records, language=batch.target_language)
    model.train(training)
    return routes


def count_expert_usage(
    routes: Iterable[Sequence[LayerRoutes]], *, languages: Sequence[str]
) -> UsageCounter:
    """Count every edge under the language of its token. The result writes ``usage.json``.

    ``languages`` are what ``Tokens.language`` indexes.
    """
    counts = UsageCounter(languages)
    for batch in routes:
        for found in batch:
            routing = found.routing
            counts.num_null_experts = found.num_null_experts
            counts.add_edges(
                found.layer,
                expert=routing.expert,
                language=found.tokens.language[routing.token],
                num_experts=routing.num_experts,
            )
    return counts


def describe_usage(counts: UsageCounter) -> dict[str, Any]:
    """Return plain data for people and for summary.json: how specialised each layer is.

    ``layers``: entropies, ``mutual_information`` in bits, and per expert its typical languages with how
    much more they use it than the average language does. ``distance`` [G][G] is how differently
    languages are routed (0..1, see ``observe.affinity``), averaged over the layers.
    """
    names, layers = counts.languages, counts.layers()
    described = {}
    for layer in layers:
        found = measure_specialization(layer.counts)
        described[layer.layer] = {
            "load_entropy": round(found.load_entropy, 4),
            "language_entropy": round(found.language_entropy, 4),
            "information": round(found.mutual_information, 4),
            "typical": [
                [[names[g], round(ratio, 2)] for g, ratio in row] for row in found.top_languages
            ],
        }
    distances = [routing_distance(layer.counts[None]) for layer in layers]
    mean = np.mean(distances, axis=0) if distances else np.zeros((0, 0))
    return {
        "languages": list(names),
        "layers": described,
        "distance": [[round(float(d), 4) for d in row] for row in mean],
    }


ANALYSIS_FORMAT = 1


MAX_POSITIONS = 512  # later ones count as the last


@dataclass(slots=True)
class _LayerStatistics:
    """Counts of one layer. ``position_counts`` [E, P] is of kept edges.

    ``pairs`` are codes of (vocabulary id, expert) that were met, ``met`` how often: a large
    vocabulary times many experts is mostly empty.
    """

    num_experts: int
    num_null_experts: int
    position_counts: np.ndarray
    token_expert_pairs: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    pair_counts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    requested: np.ndarray = field(default_factory=lambda: _empty_bins())
    dropped: np.ndarray = field(default_factory=lambda: _empty_bins())
    first_come: np.ndarray = field(default_factory=lambda: _empty_bins())
    at_random: np.ndarray = field(default_factory=lambda: _empty_bins())


class RoutingAnalysis:
    """Counts batch after batch: ``add`` routes, then read ``plain``."""

    def __init__(self) -> None:
        self._layers: dict[str, _LayerStatistics] = {}

    def add(self, routes: Sequence[LayerRoutes]) -> None:
        """Count the routes of one batch."""
        for found in routes:
            experts = found.routing.num_experts
            layer = self._layers.setdefault(
                found.layer,
                _LayerStatistics(
                    experts,
                    found.num_null_experts,
                    np.zeros((experts, MAX_POSITIONS), dtype=np.int64),
                ),
            )
            _count_layer(layer, found)

    def to_dict(self, *, show: Callable[[int], str]) -> dict[str, Any]:
        """Return what ``insight.json`` holds; ``show`` gives the text of a vocabulary id.

        Per layer ``conditional_entropy`` of the expert given the ``token`` id or the ``position`` (shares
        of the maximum) and given either dealt out anew (``token_by_chance``, ...); ``typical``
        tokens of each expert as text; and per position of the row ``asked`` edges, those
        ``dropped``, and those that room for just a fair share of each row's edges would have
        dropped: ``first_come`` and ``at_random``, in edges.
        """
        layers = {name: _layer_to_dict(layer, show=show) for name, layer in self._layers.items()}
        return {"format": ANALYSIS_FORMAT, "layers": layers}


def simulate_drops(routes: LayerRoutes, *, order: Int[Tensor, "N"]) -> Bool[Tensor, "N"]:
    """Return the edges beyond each row's fair share, were room given in the order of ``order``.

    Each row has room for ``ceil(edges / experts)`` edges per working expert, a capacity factor of
    one with the row as its group. Edges to spare experts, and those that were dropped, need none.
    """
    routing, rows = routes.routing, routes.tokens.row[routes.routing.token]
    experts = routing.num_experts - routes.num_null_experts
    wants = routing.expert < experts
    row, expert = rows[wants], routing.expert[wants]
    place = queue_positions(torch.stack([row * experts + expert, order[wants]], 1))
    room = torch.ceil(torch.bincount(row).double() / experts)
    lost = torch.zeros_like(wants)
    lost[wants] = place >= room[row]
    return lost


def _count_layer(layer: _LayerStatistics, found: LayerRoutes) -> None:
    routing, tokens = found.routing, found.tokens
    ids, position = tokens.token[routing.token], tokens.position[routing.token]
    position = position.clamp(max=MAX_POSITIONS - 1)
    kept = ~routing.dropped
    _add_pairs(layer, (ids * layer.num_experts + routing.expert)[kept].numpy())
    layer.position_counts += _expert_table(
        routing.expert[kept], position[kept], layer.position_counts.shape
    )
    layer.requested += _position_bins(position)
    layer.dropped += _position_bins(position[~kept])
    choice, places_ = choice_ranks(routing), tokens.position[routing.token]
    first_come = choice * (int(places_.max()) + 1 if places_.numel() else 1) + places_
    at_random = hash_combine(
        hash_combine(hash_combine(ids, tokens.row[routing.token]), places_), routing.expert
    )
    layer.first_come += _position_bins(position[simulate_drops(found, order=first_come)])
    layer.at_random += _position_bins(position[simulate_drops(found, order=at_random)])


def _add_pairs(layer: _LayerStatistics, pairs: np.ndarray) -> None:
    new, met = np.unique(pairs, return_counts=True)
    together = np.concatenate([layer.token_expert_pairs, new])
    layer.token_expert_pairs, place = np.unique(together, return_inverse=True)
    weight = np.concatenate([layer.pair_counts, met])
    layer.pair_counts = np.bincount(
        place, weights=weight, minlength=layer.token_expert_pairs.size
    ).astype(np.int64)


def _token_counts(layer: _LayerStatistics) -> tuple[np.ndarray, np.ndarray]:
    """Return the vocabulary ids that were met [X], and the edges of each [E, X]."""
    ids, place = np.unique(layer.token_expert_pairs // layer.num_experts, return_inverse=True)
    table = np.zeros((layer.num_experts, ids.size), dtype=np.int64)
    table[layer.token_expert_pairs % layer.num_experts, place] = layer.pair_counts
    return ids, table


def _layer_to_dict(layer: _LayerStatistics, *, show: Callable[[int], str]) -> dict[str, Any]:
    ids, by_token = _token_counts(layer)
    known = {"token": by_token, "position": layer.position_counts}
    shares = {name: conditional_entropy(counts) for name, counts in known.items()}
    shares |= {
        f"{name}_by_chance": conditional_entropy(shuffle_counts(c)) for name, c in known.items()
    }
    heard = int(layer.requested.nonzero()[0].max(initial=-1)) + 1
    bins = {
        "asked": layer.requested,
        "dropped": layer.dropped,
        "first_come": layer.first_come,
        "at_random": layer.at_random,
    }
    return {
        "experts": layer.num_experts,
        "null_experts": layer.num_null_experts,
        "uncertainty": {name: round(share, 4) for name, share in shares.items()},
        "typical": [[show(int(ids[x])) for x in row] for row in characteristic_inputs(by_token)],
        "positions": {name: counts[:heard].tolist() for name, counts in bins.items()},
    }


def _empty_bins() -> np.ndarray:
    return np.zeros(MAX_POSITIONS, dtype=np.int64)


def _position_bins(position: Int[Tensor, "N"]) -> np.ndarray:
    return torch.bincount(position, minlength=MAX_POSITIONS).numpy()


def _expert_table(
    expert: Int[Tensor, "N"], x: Int[Tensor, "N"], shape: tuple[int, ...]
) -> np.ndarray:
    cells = torch.bincount(expert * shape[1] + x, minlength=math.prod(shape))
    return cells.numpy().reshape(shape)
