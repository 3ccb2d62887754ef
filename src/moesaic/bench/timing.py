"""Rounds in which contenders take turns, and what is said of them: medians of paired ratios.

Every run stands between two of the pacer, and its ratio is to their mean: what else the machine
does at that moment hits both.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

SLOW = 20  # times the pacer: such a contender gets few rounds
FEW = 3


@dataclass(slots=True)
class Laps:
    """Seconds of each run, and its ratio to the pacer's runs around it, by round."""

    seconds: dict[int, float] = field(default_factory=dict)
    ratios: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Spread:
    """A ratio: median, quartiles, and the best run over the best run."""

    median: float
    quartiles: tuple[float, float]
    best_over_best: float


def measure(
    contenders: Mapping[str, Callable[[], object]], *, pacer: str, rounds: int
) -> dict[str, Laps]:
    """Run all in ``rounds`` rounds of random order; return the laps of each, the pacer too."""
    laps = {name: Laps() for name in contenders}
    order = random.Random(0)
    before, paced = _time(contenders[pacer]), []
    names = [name for name in contenders if name != pacer]
    for turn in range(rounds):
        order.shuffle(names)
        for name in names:
            if turn >= FEW and laps[name].ratios[0] > SLOW:
                continue
            spent = _time(contenders[name])
            after = _time(contenders[pacer])
            laps[name].seconds[turn] = spent
            laps[name].ratios[turn] = spent / ((before + after) / 2)
            paced.append(after)
            before = after
    laps[pacer].seconds.update(enumerate(paced or [before]))
    laps[pacer].ratios.update(dict.fromkeys(laps[pacer].seconds, 1.0))
    return laps


def fastest(contenders: Mapping[str, Callable[[], object]], *, among: Sequence[str]) -> str:
    """Warm every contender up, and return which of some is fastest (median of three runs)."""
    for run in contenders.values():
        run()
    return min(among, key=lambda name: statistics.median(_time(contenders[name]) for _ in range(3)))


def of_pacer(laps: Laps, pacer: Laps) -> Spread:
    """The ratio to the pacer."""
    best = min(laps.seconds.values()) / min(pacer.seconds.values())
    return _spread(list(laps.ratios.values()), best=best)


def against(laps: Laps, other: Laps) -> Spread:
    """The ratio of two contenders' ratios in the same rounds."""
    both = sorted(laps.ratios.keys() & other.ratios.keys())
    best = min(laps.seconds.values()) / min(other.seconds.values())
    return _spread([laps.ratios[turn] / other.ratios[turn] for turn in both], best=best)


def _spread(ratios: list[float], *, best: float) -> Spread:
    ordered = sorted(ratios)
    quarter = len(ordered) // 4
    return Spread(statistics.median(ordered), (ordered[quarter], ordered[-1 - quarter]), best)


def _time(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
