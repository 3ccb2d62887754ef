"""Rounds in which contenders take turns, and what is said of them: medians of paired ratios.

Every run stands between two of the pacer, and its ratio is to their mean: what else the machine
does at that moment hits both.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

SLOW_RATIO = 20  # times the pacer: such a contender gets few rounds
SLOW_ROUNDS = 3


@dataclass(slots=True)
class RunTimes:
    """Seconds of each run, and its ratio to the pacer's runs around it, by round."""

    seconds: dict[int, float] = field(default_factory=dict)
    ratios: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RatioSummary:
    """A ratio: median, quartiles, and the best run over the best run."""

    median: float
    quartiles: tuple[float, float]
    best_over_best: float


def measure_in_turns(
    implementations: Mapping[str, Callable[[], object]], *, baseline: str, rounds: int
) -> dict[str, RunTimes]:
    """Run all in ``rounds`` rounds of random order; return the laps of each, the pacer too."""
    laps = {name: RunTimes() for name in implementations}
    order = random.Random(0)
    before, paced = _time(implementations[baseline]), []
    names = [name for name in implementations if name != baseline]
    for turn in range(rounds):
        order.shuffle(names)
        for name in names:
            if turn >= SLOW_ROUNDS and laps[name].ratios[0] > SLOW_RATIO:
                continue
            spent = _time(implementations[name])
            after = _time(implementations[baseline])
            laps[name].seconds[turn] = spent
            laps[name].ratios[turn] = spent / ((before + after) / 2)
            paced.append(after)
            before = after
    laps[baseline].seconds.update(enumerate(paced or [before]))
    laps[baseline].ratios.update(dict.fromkeys(laps[baseline].seconds, 1.0))
    return laps


def fastest(implementations: Mapping[str, Callable[[], object]], *, among: Sequence[str]) -> str:
    """Warm every contender up, and return which of some is fastest (median of three runs)."""
    for run in implementations.values():
        run()
    return min(
        among, key=lambda name: statistics.median(_time(implementations[name]) for _ in range(3))
    )


def ratio_to_baseline(times: RunTimes, baseline: RunTimes) -> RatioSummary:
    """The ratio to the pacer."""
    best = min(times.seconds.values()) / min(baseline.seconds.values())
    return _summarize(list(times.ratios.values()), best=best)


def ratio_between(times: RunTimes, other: RunTimes) -> RatioSummary:
    """The ratio of two contenders' ratios in the same rounds."""
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
