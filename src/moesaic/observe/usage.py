"""UsageCounts: edges counted per (layer, expert, language), and their file ``usage.json``.

Counts are integers kept on the device; the counts of ranks add up to those of the run, so nothing
depends on the number of ranks. ``usage.json`` is ``{"format": 1, "languages": [G names],
"layers": [{"layer", "counts": [[G] * E], "dropped": [G], "dropped_late", "router_entropy",
"logit_rms", "spare"}]}``, one layer per line. The edges themselves are in a routes file
(``checkpoint/routes.py``), where one was asked for.

Letters: N edges, E experts, G languages.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moesaic.core.errors import DataError
from moesaic.core.files import read_json, atomic_write
from moesaic.core.shapes import Bool, Int, Tensor
from moesaic.observe.layer_counts import LayerUsage

USAGE_FORMAT = 1


@dataclass(frozen=True, slots=True)
class LogitStats:
    """What a router's logits were like in one pass, where known: see ``LayerCounts``."""

    router_entropy: Tensor | float | None = None
    logit_rms: Tensor | float | None = None


UNKNOWN_LOGIT_STATS = LogitStats()


class UsageCounter:
    """See the module's first lines. ``languages`` are the names that language indices stand for.

    ``spare`` is how many of the last experts of each layer do no work.
    """

    def __init__(self, languages: Sequence[str], *, num_null_experts: int = 0) -> None:
        self.languages = tuple(languages)
        self.num_null_experts = num_null_experts
        self._tensors: dict[str, Tensor] = {}

    def add_edges(
        self,
        layer: str,
        *,
        expert: Int[Tensor, "N"],
        language: Int[Tensor, "N"],
        num_experts: int,
        late: Bool[Tensor, "N"] | None = None,
        logit_stats: LogitStats = UNKNOWN_LOGIT_STATS,
    ) -> None:
        """Count the edges of one layer in one forward pass; does not wait for a GPU.

        ``expert`` is ``num_experts`` where an edge was dropped; ``language`` is that of the edge's
        token. ``late`` edges belong to the later half of the tokens.
        """
        groups = len(self.languages)
        counts = torch.bincount(expert * groups + language, minlength=(num_experts + 1) * groups)
        dropped = expert == num_experts
        lost = counts.new_zeros(1) if late is None else (dropped & late).sum()[None]
        sums = torch.zeros(4, dtype=torch.float64, device=expert.device)
        edges = expert.numel()  # weighed by them, means are the same for any number of ranks
        if logit_stats.router_entropy is not None:
            sums[0], sums[1] = logit_stats.router_entropy * edges, edges
        if logit_stats.logit_rms is not None:
            sums[2], sums[3] = logit_stats.logit_rms**2 * edges, edges
        self.merge({f"edges/{layer}": torch.cat([counts, lost]), f"scales/{layer}": sums})

    def merge(self, tensors: Mapping[str, Tensor]) -> None:
        """Add what ``tensors()`` of another rank, another interval or a checkpoint gave."""
        for name, value in tensors.items():
            mine = self._tensors.get(name)
            self._tensors[name] = value.clone() if mine is None else mine + value.to(mine.device)

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name, in the same order on every rank: add them up over ranks.

        Per layer ``edges/<layer>`` int64 [(E + 1) * G + 1]: counts, the dropped, late drops; and
        ``scales/<layer>`` float64 [4].
        """
        return {name: self._tensors[name] for name in sorted(self._tensors)}

    def reset(self) -> None:
        """Start again from nothing."""
        self._tensors = {}

    def layers(self) -> tuple[LayerUsage, ...]:
        """Read the counts on the host, layers in the order they were first counted."""
        names = [n.partition("/")[2] for n in self._tensors if n.startswith("edges/")]
        return tuple(self._read_layer(name) for name in names)

    def write(self, path: Path) -> None:
        """Write ``usage.json`` whole or not at all."""
        lines = ",\n".join(json.dumps(_layer_to_json(layer)) for layer in self.layers())
        head = f'{{"format": {USAGE_FORMAT}, "languages": {json.dumps(self.languages)}, "layers": [\n'
        atomic_write(path, f"{head}{lines}\n]}}\n")

    def _read_layer(self, name: str) -> LayerUsage:
        edges = self._tensors[f"edges/{name}"].cpu()
        entropy, entropies, square, squares = self._tensors[f"scales/{name}"].tolist()
        table = edges[:-1].view(-1, len(self.languages)).numpy()
        return LayerUsage(
            layer=name,
            counts=table[:-1],
            dropped=table[-1],
            dropped_late=int(edges[-1]),
            router_entropy=entropy / entropies if entropies else None,
            logit_rms=math.sqrt(square / squares) if squares else None,
            num_null_experts=self.num_null_experts,
        )


@dataclass(frozen=True, slots=True)
class RecordedUsage:
    """What a ``usage.json`` holds."""

    languages: tuple[str, ...]
    layers: tuple[LayerUsage, ...]


def read_usage(path: Path) -> RecordedUsage:
    """Read ``usage.json``. Raises DataError if it is not one."""
    try:
        whole = read_json(path)
        if whole["format"] != USAGE_FORMAT:
            raise DataError(f"{path}: format {whole['format']}, expected {USAGE_FORMAT}")
        groups = len(whole["languages"])
        layers = tuple(_layer_from_json(layer, groups=groups) for layer in whole["layers"])
        return RecordedUsage(tuple(whole["languages"]), layers)
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no such file; training writes it for a model with experts"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a usage file ({error})") from error


def _layer_to_json(layer: LayerUsage) -> dict[str, Any]:
    finite = {
        name: value if value is not None and math.isfinite(value) else None
        for name, value in (
            ("router_entropy", layer.router_entropy),
            ("logit_rms", layer.logit_rms),
        )
    }
    return {
        "layer": layer.layer,
        "counts": layer.counts.tolist(),
        "dropped": layer.dropped.tolist(),
        "dropped_late": layer.dropped_late,
        "spare": layer.num_null_experts,
    } | finite


def _layer_from_json(layer: dict[str, Any], *, groups: int) -> LayerUsage:
    counts = np.array(layer["counts"], dtype=np.int64)
    if counts.ndim != 2 or counts.shape[1] != groups:
        raise ValueError(f"{layer['layer']} has counts {list(counts.shape)}")
    return LayerUsage(
        layer=layer["layer"],
        counts=counts,
        dropped=np.array(layer["dropped"], dtype=np.int64),
        dropped_late=layer["dropped_late"],
        router_entropy=layer["router_entropy"],
        logit_rms=layer["logit_rms"],
        num_null_experts=layer.get("spare", 0),  # runs of the first versions had none
    )
