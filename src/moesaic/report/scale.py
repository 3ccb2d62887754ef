"""Scales: numbers to pixels, round tick marks, and thinning of long curves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

MAX_POINTS = 240  # a curve is drawn with at most this many


@dataclass(frozen=True, slots=True)
class AxisScale:
    """A linear map from ``low..high`` to the pixels ``start..end``."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return round(self.start + share * (self.end - self.start), 1)


def tick_values(low: float, high: float, *, count: int = 5) -> list[float]:
    """Return about ``count`` round numbers (1, 2, 2.5 or 5 times a power of ten) in low..high."""
    if not high > low:
        return [low]
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def axis_range(values: Sequence[float], *, from_zero: bool = False) -> tuple[float, float]:
    """Return a range that holds the finite values, widened a little; from zero if asked."""
    finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if from_zero:
        low = min(low, 0.0)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (low if from_zero and low == 0 else low - room), high + room


def format_tick(value: float) -> str:
    """``12000 -> '12k'``, ``0.0015 -> '0.0015'``: for axes."""
    if value == 0:
        return "0"
    size = abs(value)
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{value / unit:.4g}{name}"
    return f"{value:.0e}" if size < 1e-4 else f"{value:.4g}"


def thin_curve(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Average neighbours until at most ``POINTS`` are left; values that are not finite go."""
    kept = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    size = max(1, math.ceil(len(kept) / MAX_POINTS))
    groups = [kept[i : i + size] for i in range(0, len(kept), size)]
    return (
        [group[-1][0] for group in groups],
        [sum(b for _, b in group) / len(group) for group in groups],
    )
