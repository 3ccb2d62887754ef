"""Expert usage per language, counted while a model reads test sentences with their translations."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from moesaic.data.batch import Batch
from moesaic.model.transformer import Transformer
from moesaic.observe.affinity import language_distance, specialisation
from moesaic.observe.usage import UsageCounts


@torch.inference_mode()
def expert_usage(
    model: Transformer, *, batches: Iterable[Batch], languages: Sequence[str]
) -> UsageCounts:
    """Count every edge under the target language of its token's row.

    ``languages`` are what ``Batch.target_language`` indexes. The result writes ``usage.json``.
    """
    training = model.training
    model.eval()
    counts = UsageCounts(languages)
    for batch in batches:
        for record in model(batch).records:
            routing = record.routing
            counts.add(
                record.layer,
                expert=routing.expert,
                language=batch.target_language[record.row[routing.token]],
                num_experts=routing.num_experts,
            )
    model.train(training)
    return counts


def describe(counts: UsageCounts) -> dict[str, Any]:
    """Return plain data for people and for summary.json: how specialised each layer is.

    ``layers``: entropies, ``information`` in bits, and per expert its typical languages with how
    much more they use it than the average language does. ``distance`` [G][G] is how differently
    languages are routed (0..1, see ``observe.affinity``), averaged over the layers.
    """
    names, layers = counts.languages, counts.layers()
    described = {}
    for layer in layers:
        found = specialisation(layer.counts)
        described[layer.layer] = {
            "load_entropy": round(found.load_entropy, 4),
            "language_entropy": round(found.language_entropy, 4),
            "information": round(found.information, 4),
            "typical": [[[names[g], round(ratio, 2)] for g, ratio in row] for row in found.typical],
        }
    distances = [language_distance(layer.counts[None]) for layer in layers]
    mean = np.mean(distances, axis=0) if distances else np.zeros((0, 0))
    return {
        "languages": list(names),
        "layers": described,
        "distance": [[round(float(d), 4) for d in row] for row in mean],
    }
