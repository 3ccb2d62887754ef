"""Paired timing: implementations take turns; results are medians of ratios to a baseline.

Each run is between two runs of the baseline, and its ratio is to their mean, so other load on the
machine affects both.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

SLOW_RATIO = 20  # times the baseline: a slower implementation gets SLOW_ROUNDS rounds
SLOW_ROUNDS = 3


@dataclass(slots=True)
class RunTimes:
    """Seconds of each run, and its ratio to the baseline runs around it, by round."""

    seconds: dict[int, float] = field(default_factory=dict)
    ratios: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RatioSummary:
    """Median and quartiles of a ratio, and the ratio of the fastest runs."""

    median: float
    quartiles: tuple[float, float]
    best_over_best: float


def measure_in_turns(
    implementations: Mapping[str, Callable[[], object]], *, baseline: str, rounds: int
) -> dict[str, RunTimes]:
    """Run all in ``rounds`` rounds of random order; return the times of each."""
    times = {name: RunTimes() for name in implementations}
    order = random.Random(0)
    before, baseline_seconds = _time(implementations[baseline]), []
    names = [name for name in implementations if name != baseline]
    for turn in range(rounds):
        order.shuffle(names)
        for name in names:
            if turn >= SLOW_ROUNDS and times[name].ratios[0] > SLOW_RATIO:
                continue
            spent = _time(implementations[name])
            after = _time(implementations[baseline])
            times[name].seconds[turn] = spent
            times[name].ratios[turn] = spent / ((before + after) / 2)
            baseline_seconds.append(after)
            before = after
    times[baseline].seconds.update(enumerate(baseline_seconds or [before]))
    times[baseline].ratios.update(dict.fromkeys(times[baseline].seconds, 1.0))
    return times


def fastest(implementations: Mapping[str, Callable[[], object]], *, among: Sequence[str]) -> str:
    """Warm all up; return the fastest of those in ``among`` (median of three runs)."""
    for run in implementations.values():
        run()
    return min(
        among, key=lambda name: statistics.median(_time(implementations[name]) for _ in range(3))
    )


def ratio_to_baseline(times: RunTimes, baseline: RunTimes) -> RatioSummary:
    """Return the ratio to the baseline."""
    best = min(times.seconds.values()) / min(baseline.seconds.values())
    return _summarize(list(times.ratios.values()), best=best)


def ratio_between(times: RunTimes, other: RunTimes) -> RatioSummary:
    """Return the ratio of two ratios to the baseline in the same rounds."""
    both = sorted(times.ratios.keys() & other.ratios.keys())
    best = min(times.seconds.values()) / min(other.seconds.values())
    return _summarize([times.ratios[turn] / other.ratios[turn] for turn in both], best=best)


def _summarize(ratios: list[float], *, best: float) -> RatioSummary:
    ordered = sorted(ratios)
    quarter = len(ordered) // 4
    return RatioSummary(statistics.median(ordered), (ordered[quarter], ordered[-1 - quarter]), best)


def _time(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
