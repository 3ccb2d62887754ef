"""Fit: the straight line through measured times, ``seconds = alpha + beta * size``.

What starts (alpha) and what each byte, row or multiplication costs (beta) is all that the choice of
a schedule needs (Pan et al. 2025, FSMoE, arXiv:2501.10714).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moesaic.core.errors import UserError


@dataclass(frozen=True, slots=True)
class LinearCost:
    """Seconds of one call: ``alpha`` to start it and ``beta`` for each unit of its size."""

    alpha: float
    beta: float

    def seconds(self, size: float) -> float:
        return self.alpha + self.beta * size

    def scaled(self, factor: float) -> "LinearCost":
        """Return the cost of doing it so many times as much."""
        return LinearCost(self.alpha * factor, self.beta * factor)


@dataclass(frozen=True, slots=True)
class CostFit:
    """A cost, and the share of the variance of the measured times that it explains."""

    cost: LinearCost
    r_squared: float


def fit_cost(sizes: Sequence[float], seconds: Sequence[float]) -> CostFit:
    """Return the least-squares line. Neither number can be negative: if one is, it is zero.

    Raises UserError when there are fewer than two different sizes.
    """
    if len(set(sizes)) < 2 or len(sizes) != len(seconds):
        raise UserError(
            f"{len(seconds)} times of {len(set(sizes))} different sizes do not say what a start "
            "and what a byte costs: measure each of two sizes or more"
        )
    count, mean, level = len(sizes), sum(sizes) / len(sizes), sum(seconds) / len(seconds)
    spread = sum((n - mean) ** 2 for n in sizes)
    beta = sum((n - mean) * (t - level) for n, t in zip(sizes, seconds, strict=True)) / spread
    alpha = level - beta * mean
    if beta < 0:
        alpha, beta = level, 0.0
    elif alpha < 0:
        dot = sum(n * t for n, t in zip(sizes, seconds, strict=True))
        alpha, beta = 0.0, dot / sum(n * n for n in sizes)
    cost = LinearCost(alpha, beta)
    left = sum((t - cost.seconds(n)) ** 2 for n, t in zip(sizes, seconds, strict=True)) / count
    varied = sum((t - level) ** 2 for t in seconds) / count
    return CostFit(cost, 1 - left / varied if varied else 1.0)
