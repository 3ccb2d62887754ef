"""Paired bootstrap: confidence intervals of corpus scores (Koehn 2004, W04-3250).

Every system of a test set is scored on the same resamples, so differences are paired. A resample is
a vector of how often each sentence was drawn; scores of all resamples are one product
``draws [R, N] @ statistics [N, C]``.

Letters: R resamples, N sentences, C statistics per sentence.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_MAX_DRAW_CELLS = 2**24  # of the draws matrix held at once: 128 MiB as float64


SumScore = Callable[[np.ndarray], np.ndarray]
"""A score that is a function of summed statistics: [..., C] -> [...]."""


@dataclass(frozen=True, slots=True)
class ScoreInterval:
    """A score and its 95 % interval."""

    score: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ScoreDifference:
    """A difference of two scores on the same sentences, its 95 % interval, and a p-value.

    ``p`` is two-sided: the share of resampled differences, minus their mean, that are larger than
    the real difference in size, on either side. ``p_sacrebleu`` is sacreBLEU's paired bootstrap
    (``sacrebleu --paired-bs``), which is one-tailed: the share of resampled absolute differences,
    minus their mean, that are larger than the real one. Both are 1 for equal scores.
    """

    difference: float
    low: float
    high: float
    p: float
    p_sacrebleu: float = 1.0


@dataclass(frozen=True, slots=True)
class BootstrapScores:
    """A score on the real corpus and on every resample (float64 [R])."""

    score: float
    resampled: np.ndarray

    def confidence_interval(self) -> ScoreInterval:
        return ScoreInterval(self.score, *_percentile_interval(self.resampled))

    def compare(self, other: "BootstrapScores") -> ScoreDifference:
        """Compare with another system's scores on the same resamples."""
        real, drawn = self.score - other.score, self.resampled - other.resampled
        sizes = np.abs(drawn)
        two_sided = _p_value(np.abs(drawn - drawn.mean()), real)
        one_tailed = _p_value(sizes - sizes.mean(), real)
        return ScoreDifference(real, *_percentile_interval(drawn), two_sided, one_tailed)


def bootstrap_resample(
    score: SumScore, *, statistics: np.ndarray, resamples: int = 1000, seed: int = 0
) -> BootstrapScores:
    """Score the corpus and ``resamples`` corpora of N sentences drawn with replacement from it.

    The draws depend on ``seed``, ``resamples`` and N alone: they are the same for all systems that
    are scored on the same sentences.
    """
    count = len(statistics)
    random = np.random.default_rng(seed)
    rows = max(1, min(resamples, _MAX_DRAW_CELLS // count))
    scores = []
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        drawn = random.integers(0, count, (size, count))
        drawn += np.arange(size)[:, None] * count  # one bincount counts all rows
        draws = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        scores.append(score(draws.astype(np.float64) @ statistics))
    real = float(score(statistics.sum(0)))
    return BootstrapScores(real, np.concatenate(scores) if scores else np.full(1, real))


def macro_average(samples: "list[BootstrapScores]") -> BootstrapScores:
    """Average scores over languages (macro average), resampling each language independently."""
    return BootstrapScores(
        float(np.mean([s.score for s in samples])), np.mean([s.resampled for s in samples], axis=0)
    )


def _p_value(statistics: np.ndarray, real: float) -> float:
    """Return the share of ``statistics`` [R] above the real difference; 1 for equal scores."""
    return (int((statistics > abs(real)).sum()) + 1) / (len(statistics) + 1) if real else 1.0


def _percentile_interval(resampled: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)
