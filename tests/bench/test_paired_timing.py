"""Ratios are of runs side by side; what is slow gets few rounds."""

from moesaic.bench import paired_timing
from moesaic.bench.paired_timing import fastest, measure_in_turns, ratio_between, ratio_to_baseline


class Clock:
    """A clock that only implementations advance."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(paired_timing.time, "perf_counter", lambda: self.now)

    def takes(self, seconds):
        def run():
            self.now += seconds

        return run


def test_an_implementation_of_half_the_speed_has_ratio_two(monkeypatch):
    clock = Clock(monkeypatch)
    times = measure_in_turns(
        {"dense": clock.takes(1.0), "slow": clock.takes(2.0), "quick": clock.takes(0.5)},
        baseline="dense",
        rounds=4,
    )
    assert ratio_to_baseline(times["slow"], times["dense"]).median == 2.0
    assert ratio_to_baseline(times["dense"], times["dense"]).median == 1.0
    assert ratio_between(times["slow"], times["quick"]).median == 4.0
    assert ratio_between(times["slow"], times["quick"]).best_over_best == 4.0


def test_a_machine_that_slows_down_changes_no_ratio(monkeypatch):
    clock = Clock(monkeypatch)

    def growing(share):
        def run():
            clock.now += share * 1.01 ** min(clock.now, 300.0)

        return run

    times = measure_in_turns(
        {"dense": growing(1.0), "other": growing(1.5)}, baseline="dense", rounds=9
    )
    ratio = ratio_to_baseline(times["other"], times["dense"])
    assert 1.45 < ratio.median < 1.55
    assert max(times["other"].seconds.values()) > 1.2 * min(times["other"].seconds.values())


def test_a_very_slow_implementation_gets_three_rounds(monkeypatch):
    clock = Clock(monkeypatch)
    runs = {"dense": clock.takes(1.0), "snail": clock.takes(50.0), "other": clock.takes(1.0)}
    times = measure_in_turns(runs, baseline="dense", rounds=6)
    assert len(times["snail"].seconds) == 3
    assert len(times["other"].seconds) == 6
    assert ratio_between(times["snail"], times["other"]).median == 50.0


def test_the_baseline_is_the_fastest_of_those_that_may_be(monkeypatch):
    clock = Clock(monkeypatch)
    runs = {"a": clock.takes(3.0), "b": clock.takes(2.0), "c": clock.takes(1.0)}
    assert fastest(runs, among=["a", "b"]) == "b"


def test_the_baseline_alone_is_measured_too(monkeypatch):
    times = measure_in_turns({"dense": Clock(monkeypatch).takes(1.0)}, baseline="dense", rounds=2)
    assert ratio_to_baseline(times["dense"], times["dense"]).median == 1.0
