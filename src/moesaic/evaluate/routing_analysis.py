"""Routing analysis: expert usage by language, and what routers base their choice on.

``RoutingAnalysis`` accumulates recorded routes and answers two questions of OpenMoE
(arXiv:2402.01739): does the expert depend on the token id or on the position alone, and are late
tokens dropped more often? Results are plain data, written as ``insight.json``. The third question,
when routing settles during training, is answered by ``moe/routing_agreement.py``.

Letters: N edges, E experts, P positions, V vocabulary ids.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from moesaic.core.shapes import Bool, Int, Tensor
from moesaic.data.batch import TARGET_LANGUAGE, Batch
from moesaic.model.transformer import Transformer
from moesaic.moe.edge_queues import queue_positions
from moesaic.moe.expert_capacity import choice_ranks
from moesaic.moe.routing_record import LayerRoutes, routes_from_records
from moesaic.monitor.expert_usage import UsageCounter
from moesaic.monitor.specialization import (
    characteristic_inputs,
    conditional_entropy,
    measure_specialization,
    shuffle_counts,
)
from moesaic.ops.counter_rng import hash_combine

ANALYSIS_FORMAT = 1
MAX_POSITIONS = 512  # later positions count as the last one


@torch.inference_mode()
def record_routes(model: Transformer, batch: Batch) -> tuple[LayerRoutes, ...]:
    """Return a model's routing of a batch in eval mode; a token's language is the target's."""
    training = model.training
    model.eval()
    routes = routes_from_records(model(batch).records, language=batch.groups[TARGET_LANGUAGE])
    model.train(training)
    return routes


def describe_usage(usage: UsageCounter) -> dict[str, dict[str, Any]]:
    """Return per layer how specialized its experts are in languages, as plain data.

    Entropies are shares of their maximum, ``information`` is in bits, ``typical`` lists per expert
    [language, use relative to the average language].
    """
    described = {}
    for layer in usage.layers():
        found = measure_specialization(layer.counts)
        described[layer.layer] = {
            "load_entropy": round(found.load_entropy, 4),
            "language_entropy": round(found.language_entropy, 4),
            "information": round(found.mutual_information, 4),
            "typical": [
                [[usage.languages[g], round(ratio, 2)] for g, ratio in row]
                for row in found.top_languages
            ],
        }
    return described


def _position_counts() -> np.ndarray:
    return np.zeros(MAX_POSITIONS, dtype=np.int64)


@dataclass(slots=True)
class _LayerStatistics:
    """Counts of one layer: kept edges by expert and position [E, P], all others by position [P].

    ``token_expert_pairs`` are codes ``id * E + expert`` of the pairs that occur, ``pair_counts``
    their edges: the dense table [E, V] would be mostly empty.
    """

    num_experts: int
    num_null_experts: int
    position_counts: np.ndarray
    token_expert_pairs: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    pair_counts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    requested: np.ndarray = field(default_factory=_position_counts)
    dropped: np.ndarray = field(default_factory=_position_counts)
    first_come: np.ndarray = field(default_factory=_position_counts)
    at_random: np.ndarray = field(default_factory=_position_counts)


class RoutingAnalysis:
    """Accumulates routes of batches: ``add`` them, then read ``usage`` and ``to_dict``.

    ``usage`` counts every edge under the language of its token, one of ``languages``.
    """

    def __init__(self, languages: Sequence[str]) -> None:
        self.usage = UsageCounter(languages)
        self._layers: dict[str, _LayerStatistics] = {}

    def add(self, routes: Sequence[LayerRoutes]) -> None:
        """Count the routes of one batch."""
        for layer_routes in routes:
            routing, experts = layer_routes.routing, layer_routes.routing.num_experts
            self.usage.null_experts[layer_routes.layer] = layer_routes.num_null_experts
            self.usage.add_edges(
                layer_routes.layer,
                expert=routing.expert,
                language=layer_routes.tokens.language[routing.token],
                num_experts=experts,
            )
            layer = self._layers.setdefault(
                layer_routes.layer,
                _LayerStatistics(
                    experts,
                    layer_routes.num_null_experts,
                    np.zeros((experts, MAX_POSITIONS), dtype=np.int64),
                ),
            )
            _count_layer(layer, layer_routes)

    def to_dict(self, *, show: Callable[[int], str]) -> dict[str, Any]:
        """Return the content of ``insight.json``; ``show`` returns the text of a vocabulary id.

        Per layer: ``uncertainty``, the conditional entropy of the expert given the ``token`` id or
        the ``position`` as a share of its maximum, and the same for shuffled inputs
        (``token_by_chance``, ...); ``typical`` tokens of each expert as text; ``positions``, edges
        per position of the row: ``asked``, ``dropped``, and those that a capacity factor of one per
        row would drop, in order of position (``first_come``) or ``at_random``.
        """
        layers = {name: _layer_to_dict(layer, show=show) for name, layer in self._layers.items()}
        return {"format": ANALYSIS_FORMAT, "layers": layers}


def simulate_drops(routes: LayerRoutes, *, order: Int[Tensor, "N"]) -> Bool[Tensor, "N"]:
    """Return the edges that a capacity factor of one per row would drop, lowest ``order`` kept.

    The capacity of an expert is ``ceil(edges of the row / experts)``. Edges to null experts, and
    edges that are dropped already, do not count.
    """
    routing, rows = routes.routing, routes.tokens.row[routes.routing.token]
    experts = routing.num_experts - routes.num_null_experts
    counted = routing.expert < experts
    row, expert = rows[counted], routing.expert[counted]
    place = queue_positions(torch.stack([row * experts + expert, order[counted]], 1))
    capacity = torch.ceil(torch.bincount(row).double() / experts)
    dropped = torch.zeros_like(counted)
    dropped[counted] = place >= capacity[row]
    return dropped


def _count_layer(layer: _LayerStatistics, routes: LayerRoutes) -> None:
    routing, tokens = routes.routing, routes.tokens
    ids, position = tokens.token[routing.token], tokens.position[routing.token]
    clamped = position.clamp(max=MAX_POSITIONS - 1)
    kept = ~routing.dropped
    _add_pairs(layer, (ids * layer.num_experts + routing.expert)[kept].numpy())
    shape = layer.position_counts.shape
    cells = routing.expert[kept] * shape[1] + clamped[kept]
    layer.position_counts += (
        torch.bincount(cells, minlength=math.prod(shape)).numpy().reshape(shape)
    )
    length = int(position.max()) + 1 if position.numel() else 1
    in_order = choice_ranks(routing) * length + position
    shuffled = hash_combine(
        hash_combine(hash_combine(ids, tokens.row[routing.token]), position), routing.expert
    )
    for counts, edges in (
        (layer.requested, torch.ones_like(kept)),
        (layer.dropped, ~kept),
        (layer.first_come, simulate_drops(routes, order=in_order)),
        (layer.at_random, simulate_drops(routes, order=shuffled)),
    ):
        counts += torch.bincount(clamped[edges], minlength=MAX_POSITIONS).numpy()


def _add_pairs(layer: _LayerStatistics, pairs: np.ndarray) -> None:
    new, counts = np.unique(pairs, return_counts=True)
    codes = np.concatenate([layer.token_expert_pairs, new])
    layer.token_expert_pairs, place = np.unique(codes, return_inverse=True)
    weights = np.concatenate([layer.pair_counts, counts])
    size = layer.token_expert_pairs.size
    layer.pair_counts = np.bincount(place, weights=weights, minlength=size).astype(np.int64)


def _token_counts(layer: _LayerStatistics) -> tuple[np.ndarray, np.ndarray]:
    """Return the vocabulary ids that occur [X], and the edges of each by expert [E, X]."""
    ids, place = np.unique(layer.token_expert_pairs // layer.num_experts, return_inverse=True)
    table = np.zeros((layer.num_experts, ids.size), dtype=np.int64)
    table[layer.token_expert_pairs % layer.num_experts, place] = layer.pair_counts
    return ids, table


def _layer_to_dict(layer: _LayerStatistics, *, show: Callable[[int], str]) -> dict[str, Any]:
    ids, token_counts = _token_counts(layer)
    inputs = {"token": token_counts, "position": layer.position_counts}
    entropies = {name: conditional_entropy(counts) for name, counts in inputs.items()}
    entropies |= {
        f"{name}_by_chance": conditional_entropy(shuffle_counts(c)) for name, c in inputs.items()
    }
    length = int(layer.requested.nonzero()[0].max(initial=-1)) + 1
    positions = {
        "asked": layer.requested,
        "dropped": layer.dropped,
        "first_come": layer.first_come,
        "at_random": layer.at_random,
    }
    return {
        "experts": layer.num_experts,
        "null_experts": layer.num_null_experts,
        "uncertainty": {name: round(entropy, 4) for name, entropy in entropies.items()},
        "typical": [
            [show(int(ids[x])) for x in row] for row in characteristic_inputs(token_counts)
        ],
        "positions": {name: counts[:length].tolist() for name, counts in positions.items()},
    }
