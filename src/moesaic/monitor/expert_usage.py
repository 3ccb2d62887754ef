"""Expert usage: edges (token-expert assignments) counted per MoE layer, expert and language.

``UsageCounter`` counts on the device. Counts are integers and add up over ranks, so the result does
not depend on the number of ranks. ``LayerUsage`` holds one layer's counts on the host and derives
load-balance metrics from them. ``usage.json`` stores them, one layer a line: ``{"format": 1,
"languages": [G names], "layers": [{"layer", "counts": [[G] * E], "dropped": [G], "dropped_late",
"null_experts", "router_entropy", "logit_rms"}]}``. The edges themselves are stored in a routes file
(``checkpoint/routes_file.py``) if one is requested.

Letters: N edges, E experts, G languages.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from moesaic.core.errors import DataError
from moesaic.core.file_reader import MAX_INT, MIB, Count, FileKind, FileShape
from moesaic.core.files import atomic_write
from moesaic.core.shapes import Bool, Int, Tensor

USAGE_FORMAT = 1
USAGE_FILE = FileKind(name="table of expert usage", max_bytes=64 * MIB, error=DataError)


@dataclass(frozen=True, slots=True)
class LayerUsage:
    """Edges of one MoE layer over some steps.

    ``counts`` [E, G] are the edges that reached an expert, ``dropped`` [G] those that did not;
    ``dropped_late`` of the dropped belong to a token in the later half of its micro-batch's queue.
    ``router_entropy`` is the mean entropy of a token's expert probabilities as a share of
    ``log E``, ``logit_rms`` the root mean square of the logits' logsumexp; None where not measured.
    The last ``num_null_experts`` experts compute nothing; load balance is that of the others.
    """

    layer: str
    counts: np.ndarray
    dropped: np.ndarray
    dropped_late: int = 0
    router_entropy: float | None = None
    logit_rms: float | None = None
    num_null_experts: int = 0

    @property
    def num_experts(self) -> int:
        return self.counts.shape[0]

    @property
    def load(self) -> np.ndarray:
        """Edges per expert [E]."""
        return self.counts.sum(1)

    @property
    def computing_load(self) -> np.ndarray:
        """Edges per expert without the null experts [E - num_null_experts]."""
        return self.load[: self.num_experts - self.num_null_experts]

    @property
    def null_expert_frac(self) -> float:
        """Share of the kept edges that go to null experts."""
        total = max(float(self.load.sum()), 1)
        return 1 - float(self.computing_load.sum()) / total if self.num_null_experts else 0.0

    @property
    def edges(self) -> int:
        return int(self.counts.sum() + self.dropped.sum())

    @property
    def mean_load(self) -> float:
        """Edges per computing expert under perfect balance."""
        return float(self.computing_load.mean()) if self.computing_load.size else 0.0

    @property
    def drop_frac(self) -> float:
        return float(self.dropped.sum()) / max(self.edges, 1)

    @property
    def max_vio(self) -> float:
        """``max load / mean load - 1`` (arXiv:2408.15664): 0 is balanced, E - 1 is one expert."""
        return float(self.computing_load.max()) / self.mean_load - 1 if self.mean_load else 0.0

    @property
    def min_load(self) -> float:
        """The least used expert's load as a share of the mean load."""
        return float(self.computing_load.min()) / self.mean_load if self.mean_load else 0.0

    @property
    def dead_experts(self) -> int:
        return int((self.computing_load == 0).sum())

    @property
    def effective_experts(self) -> float:
        """``exp(entropy of the load)``: E when balanced, 1 when one expert gets every edge."""
        load = self.computing_load
        share = load[load > 0] / max(load.sum(), 1)
        return float(np.exp(-(share * np.log(share)).sum()))

    @property
    def load_entropy(self) -> float:
        """Entropy of the load as a share of its maximum: 1 is balanced."""
        experts = self.computing_load.size
        if experts == 1:
            return 1.0
        return math.log(self.effective_experts) / math.log(experts) if self.mean_load else 0.0


def summarize_load(layers: Sequence[LayerUsage]) -> dict[str, float]:
    """Return the ``moe/`` metrics of one step: the worst layer of each, the sum of dead experts.

    ``moe/max_vio`` (with ``_p50`` and ``_p95`` over the layers), ``moe/min_load``,
    ``moe/dead_experts``, ``moe/load_entropy``, ``moe/drop_frac``, ``moe/null_expert_frac`` where
    there are null experts, ``moe/router_entropy`` and ``moe/logit_rms`` where measured.
    """
    if not layers:
        return {}
    median, high = np.quantile([x.max_vio for x in layers], (0.5, 0.95)).tolist()
    row = {
        "moe/max_vio": max(x.max_vio for x in layers),
        "moe/max_vio_p50": median,
        "moe/max_vio_p95": high,
        "moe/min_load": min(x.min_load for x in layers),
        "moe/dead_experts": float(sum(x.dead_experts for x in layers)),
        "moe/load_entropy": min(x.load_entropy for x in layers),
        "moe/drop_frac": max(x.drop_frac for x in layers),
    }
    if any(x.num_null_experts for x in layers):
        row["moe/null_expert_frac"] = max(x.null_expert_frac for x in layers)
    if entropies := [x.router_entropy for x in layers if x.router_entropy is not None]:
        row["moe/router_entropy"] = min(entropies)
    if scales := [x.logit_rms for x in layers if x.logit_rms is not None]:
        row["moe/logit_rms"] = max(scales)
    return row


@dataclass(frozen=True, slots=True)
class LogitStats:
    """Router logits of one forward pass, where measured: see ``LayerUsage``."""

    router_entropy: Tensor | float | None = None
    logit_rms: Tensor | float | None = None


UNKNOWN_LOGIT_STATS = LogitStats()


class UsageCounter:
    """Counts edges per layer, expert and language; see the module's docstring.

    ``languages`` are the names that language indices refer to. ``null_experts`` is the number of
    null experts at the end of a layer's experts, by layer; 0 for a layer that is not in it.
    """

    def __init__(
        self, languages: Sequence[str], *, null_experts: Mapping[str, int] | None = None
    ) -> None:
        self.languages = tuple(languages)
        self.null_experts = dict(null_experts or {})
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
        """Count the edges of one layer in one forward pass; does not synchronize with a GPU.

        ``expert`` is ``num_experts`` for a dropped edge; ``language`` is that of the edge's token;
        ``late`` marks edges of tokens in the later half of the queue.
        """
        groups = len(self.languages)
        counts = torch.bincount(expert * groups + language, minlength=(num_experts + 1) * groups)
        dropped = expert == num_experts
        dropped_late = counts.new_zeros(1) if late is None else (dropped & late).sum()[None]
        sums = torch.zeros(4, dtype=torch.float64, device=expert.device)
        edges = expert.numel()  # means weighted by edges are the same for any number of ranks
        if logit_stats.router_entropy is not None:
            sums[0], sums[1] = logit_stats.router_entropy * edges, edges
        if logit_stats.logit_rms is not None:
            sums[2], sums[3] = logit_stats.logit_rms**2 * edges, edges
        self.merge({f"edges/{layer}": torch.cat([counts, dropped_late]), f"scales/{layer}": sums})

    def merge(self, tensors: Mapping[str, Tensor]) -> None:
        """Add the ``tensors()`` of another rank, another interval or a checkpoint."""
        for name, value in tensors.items():
            own = self._tensors.get(name)
            self._tensors[name] = value.clone() if own is None else own + value.to(own.device)

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name, in the same order on every rank: all-reduce them with a sum.

        Per layer ``edges/<layer>`` int64 [(E + 1) * G + 1]: counts, dropped, late drops; and
        ``scales/<layer>`` float64 [4].
        """
        return {name: self._tensors[name] for name in sorted(self._tensors)}

    def reset(self) -> None:
        """Set all counts to zero."""
        self._tensors = {}

    def layers(self) -> tuple[LayerUsage, ...]:
        """Copy the counts to the host, layers in the order in which they were first counted."""
        names = [n.partition("/")[2] for n in self._tensors if n.startswith("edges/")]
        return tuple(self._read_layer(name) for name in names)

    def write(self, path: Path) -> None:
        """Write ``usage.json`` atomically."""
        lines = ",\n".join(json.dumps(_layer_to_json(layer)) for layer in self.layers())
        head = f'{{"format": {USAGE_FORMAT}, "languages": {json.dumps(self.languages)}'
        atomic_write(path, f'{head}, "layers": [\n{lines}\n]}}\n')

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
            num_null_experts=self.null_experts.get(name, 0),
        )


class _LayerShape(FileShape):
    layer: str
    counts: tuple[tuple[Count, ...], ...] = Field(min_length=1)
    dropped: tuple[Count, ...]
    dropped_late: Count
    router_entropy: float | None = Field(ge=0)
    logit_rms: float | None = Field(ge=0)
    null_experts: Count | None = None
    spare: Count = 0  # the name of ``null_experts`` in files of older versions

    @property
    def num_null_experts(self) -> int:
        return self.spare if self.null_experts is None else self.null_experts

    def problem(self, *, groups: int) -> str:
        """Return what does not fit together, or nothing."""
        widths = {len(row) for row in (*self.counts, self.dropped)}
        if widths != {groups}:
            return f"rows of {sorted(widths)} numbers, expected one for each of {groups} languages"
        if self.num_null_experts >= len(self.counts):
            return f"{self.num_null_experts} null experts, but {len(self.counts)} experts"
        if self.dropped_late > sum(self.dropped):
            return f"dropped_late is {self.dropped_late}, but {sum(self.dropped)} are dropped"
        edges = sum(map(sum, self.counts)) + sum(self.dropped)
        return "" if edges <= MAX_INT else f"{edges} edges, expected at most {MAX_INT}"


class _UsageShape(FileShape):
    kind: ClassVar[FileKind] = USAGE_FILE
    format: Literal[1]  # USAGE_FORMAT
    languages: tuple[str, ...]
    layers: tuple[_LayerShape, ...]


@dataclass(frozen=True, slots=True)
class RecordedUsage:
    """The content of a ``usage.json``."""

    languages: tuple[str, ...]
    layers: tuple[LayerUsage, ...]


def read_usage(path: Path) -> RecordedUsage:
    """Read ``usage.json``. Raises DataError if it is not one."""
    found = _UsageShape.read(path)
    for number, layer in enumerate(found.layers):
        if problem := layer.problem(groups=len(found.languages)):
            raise USAGE_FILE.problem(path, f"layers.{number}: {problem}")
    layers = (
        LayerUsage(
            layer.layer,
            np.array(layer.counts, dtype=np.int64),
            np.array(layer.dropped, dtype=np.int64),
            layer.dropped_late,
            layer.router_entropy,
            layer.logit_rms,
            layer.num_null_experts,
        )
        for layer in found.layers
    )
    return RecordedUsage(found.languages, tuple(layers))


def _layer_to_json(layer: LayerUsage) -> dict[str, Any]:
    measured = {"router_entropy": layer.router_entropy, "logit_rms": layer.logit_rms}
    return {
        "layer": layer.layer,
        "counts": layer.counts.tolist(),
        "dropped": layer.dropped.tolist(),
        "dropped_late": layer.dropped_late,
        "null_experts": layer.num_null_experts,
    } | {n: x if x is not None and math.isfinite(x) else None for n, x in measured.items()}
