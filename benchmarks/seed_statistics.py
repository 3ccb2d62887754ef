"""Means over seeds with 95 % intervals, and paired differences between two variants."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

# 97.5 % points of Student's t by degrees of freedom
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean, half the width of its interval (NaN for one seed), and the values."""
    number = len(values)
    mean = sum(values) / number
    variance = sum((v - mean) ** 2 for v in values) / max(number - 1, 1)
    half = _T.get(number - 1, 1.96) * math.sqrt(variance / number) if number > 1 else math.nan
    return {"mean": mean, "half_width": half, "values": list(values)}


def by_metric(seeds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Return the interval of each metric that every seed has."""
    names = [name for name in seeds[0] if all(name in one for one in seeds)]
    return {name: interval([one[name] for one in seeds]) for name in names}


def differences(
    first: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]]
) -> dict[str, dict[str, Any]]:
    """Return the interval of ``first`` minus ``other``, seed by seed, of each metric of both."""
    pairs = [
        {name: a[name] - b[name] for name in a if name in b}
        for a, b in zip(first, other, strict=True)
    ]
    return by_metric(pairs)


def shown(entry: Mapping[str, Any], *, digits: int = 3, sign: str = "") -> str:
    """Return ``mean ± half width``."""
    return f"{entry['mean']:{sign}.{digits}f} ± {entry['half_width']:.{digits}f}"
