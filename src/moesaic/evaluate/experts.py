"""Which experts read a text, and how much each language uses them."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from moesaic.data.batch import Batch
from moesaic.model.transformer import Transformer
from moesaic.moe.routes import LayerRoutes, routes_from_records
from moesaic.observe.affinity import routing_distance, measure_specialization
from moesaic.observe.usage import UsageCounter


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

    ``layers``: entropies, ``information`` in bits, and per expert its typical languages with how
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
            "typical": [[[names[g], round(ratio, 2)] for g, ratio in row] for row in found.top_languages],
        }
    distances = [routing_distance(layer.counts[None]) for layer in layers]
    mean = np.mean(distances, axis=0) if distances else np.zeros((0, 0))
    return {
        "languages": list(names),
        "layers": described,
        "distance": [[round(float(d), 4) for d in row] for row in mean],
    }
