"""LayerCounts: how one MoE layer spread its tokens, and what that says in a few numbers.

Letters: E experts, G languages.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class LayerUsage:
    """Edges of some steps.

    ``counts`` [E, G] reached their expert, ``dropped`` [G] did not; ``dropped_late`` of those left
    a token in the later half of its micro-batch's queue. ``router_entropy`` is the mean entropy of
    a token's expert probabilities as a share of ``log E`` and ``logit_rms`` the root mean square of
    the logits' logsumexp, where the caller knew them. The last ``spare`` experts do no work: what
    is said of balance is said of the others.
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
        """Edges per expert that does work [E - spare]."""
        return self.load[: self.num_experts - self.num_null_experts]

    @property
    def null_expert_frac(self) -> float:
        """The share of served edges that cost nothing."""
        return 1 - float(self.computing_load.sum()) / max(float(self.load.sum()), 1) if self.num_null_experts else 0.0

    @property
    def edges(self) -> int:
        return int(self.counts.sum() + self.dropped.sum())

    @property
    def mean_load(self) -> float:
        """Edges per working expert if all were alike."""
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
        """The least used expert's load as a share of the mean."""
        return float(self.computing_load.min()) / self.mean_load if self.mean_load else 0.0

    @property
    def dead_experts(self) -> int:
        return int((self.computing_load == 0).sum())

    @property
    def effective_experts(self) -> float:
        """``exp(entropy of the load)``: E when balanced, 1 when one expert takes everything."""
        share = self.computing_load[self.computing_load > 0] / max(self.computing_load.sum(), 1)
        return float(np.exp(-(share * np.log(share)).sum()))

    @property
    def load_entropy(self) -> float:
        """Entropy of the load as a share of its maximum: 1 is balanced."""
        if self.computing_load.size == 1:
            return 1.0
        return math.log(self.effective_experts) / math.log(self.computing_load.size) if self.mean_load else 0.0


def summarize_load(layers: Sequence[LayerUsage]) -> dict[str, float]:
    """Return the metrics of a row: the worst layer for each, the sum for dead experts.

    ``moe/max_vio`` (and its ``_p50`` and ``_p95`` over the layers), ``moe/min_load``,
    ``moe/dead_experts``, ``moe/load_entropy``, ``moe/drop_frac``, ``moe/spare_frac`` where there
    are spare experts, and ``moe/router_entropy`` and ``moe/logit_rms`` where known.
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
        row["moe/spare_frac"] = max(x.null_expert_frac for x in layers)
    entropies = [x.router_entropy for x in layers if x.router_entropy is not None]
    scales = [x.logit_rms for x in layers if x.logit_rms is not None]
    row |= {"moe/router_entropy": min(entropies)} if entropies else {}
    return row | ({"moe/logit_rms": max(scales)} if scales else {})
