"""Learning-rate schedules follow their formulas."""

import math

import pytest

from moesaic.core.config import Config
from moesaic.core.errors import ConfigError
from moesaic.optim.lr_schedule import (
    WSD,
    Constant,
    Cosine,
    CosineDecay,
    InverseSqrt,
    LinearDecay,
    LRSchedule,
)


@pytest.mark.parametrize(
    "schedule", [WSD(warmup=0.1), Cosine(warmup=100), InverseSqrt(warmup=0.1), Constant(warmup=100)]
)
def test_warm_up_rises_evenly_to_one(schedule):
    assert schedule.lr_factor(0, steps=1000) == pytest.approx(1 / 100)
    assert schedule.lr_factor(49, steps=1000) == pytest.approx(0.5)
    assert schedule.lr_factor(99, steps=1000) == pytest.approx(1)


@pytest.mark.parametrize(
    "schedule", [WSD(final=0.1), Cosine(final=0.1), InverseSqrt(warmup=9), Constant()]
)
def test_factors_stay_between_zero_and_one_and_never_rise_after_warm_up(schedule):
    values = [schedule.lr_factor(s, steps=500) for s in range(500)]
    assert all(0 < v <= 1 for v in values)
    start = values.index(max(values))
    assert all(a >= b - 1e-12 for a, b in zip(values[start:], values[start + 1 :], strict=False))


def test_wsd_is_flat_then_decays_over_its_share():
    schedule = WSD(warmup=10, decay=0.25, shape=LinearDecay(), final=0.2)
    assert [schedule.lr_factor(s, steps=100) for s in (10, 50, 75)] == [1, 1, 1]
    assert schedule.lr_factor(87, steps=100) == pytest.approx(1 - 0.8 * 12 / 25)
    assert schedule.lr_factor(100, steps=100) == pytest.approx(0.2)


def test_shares_scale_with_the_steps_and_numbers_do_not():
    share, number = WSD(warmup=0.1, decay=0.5), WSD(warmup=10, decay=50)
    for step in range(100):
        assert share.lr_factor(step, steps=100) == number.lr_factor(step, steps=100)
    assert [s.lr_factor(9, steps=1000) for s in (share, number)] == [0.1, 1.0]
    assert (share.decay_start(1000), number.decay_start(1000)) == (500, 950)
    assert WSD(warmup=0.05).lr_factor(0, steps=19) == 1  # less than one step


@pytest.mark.parametrize("field", ["warmup=1.5", "warmup=-0.1", "decay=1.5", "decay=-1"])
def test_what_is_neither_a_share_nor_a_number_of_steps_is_refused(field):
    with pytest.raises(ConfigError):
        Holder.from_dict({"schedule": f"WSD({field})"})


def test_a_cosine_decay_is_half_way_at_half_time():
    schedule = WSD(warmup=0, decay=0.5, shape=CosineDecay())
    assert [schedule.lr_factor(s, steps=100) for s in (50, 75)] == [1, pytest.approx(0.5)]
    assert schedule.lr_factor(60, steps=100) > WSD(
        warmup=0, decay=0.5, shape=LinearDecay()
    ).lr_factor(60, steps=100)


def test_warm_up_is_one_step_before_that_of_transformers():
    theirs = [min(1.0, step / 10) for step in range(30)]  # get_constant_schedule_with_warmup
    ours = [Constant(warmup=10).lr_factor(step, steps=30) for step in range(29)]
    assert ours == pytest.approx(theirs[1:])
    theirs = [min(step / 10, (10 / step) ** 0.5 if step else 0.0) for step in range(30)]
    ours = [InverseSqrt(warmup=10).lr_factor(step, steps=30) for step in range(29)]
    assert ours == pytest.approx(theirs[1:])


def test_one_minus_sqrt_falls_faster_at_first():
    assert WSD(warmup=0, decay=1).lr_factor(25, steps=100) == pytest.approx(0.5)


def test_the_last_update_has_a_positive_rate():
    assert WSD(warmup=0, final=0, shape=LinearDecay()).lr_factor(99, steps=100) > 0


def test_cosine_is_half_way_at_half_time():
    schedule = Cosine(warmup=20, final=0)
    assert schedule.lr_factor(60, steps=100) == pytest.approx(0.5)
    assert schedule.lr_factor(100, steps=100) == pytest.approx(0)


def test_inverse_sqrt_follows_its_formula():
    assert InverseSqrt(warmup=100).lr_factor(399, steps=1) == pytest.approx(math.sqrt(100 / 400))


def test_a_run_shorter_than_its_warm_up_still_has_a_factor():
    assert 0 < WSD(warmup=100).lr_factor(4, steps=5) < 1
    assert Cosine(warmup=100).lr_factor(4, steps=5) == pytest.approx(0.05)


class Holder(Config):
    schedule: LRSchedule


def test_a_misspelt_schedule_names_the_nearest():
    with pytest.raises(ConfigError, match="Cosine"):
        Holder.from_dict({"schedule": {"kind": "cosine"}})
