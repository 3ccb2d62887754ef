"""Linear costs fitted to measured times, and the number of chunks that they make fastest."""

import random

import pytest
from chunk_schedule import (
    CHUNK_CANDIDATES,
    LayerCost,
    StageCost,
    best_num_chunks,
    fit_cost,
    modelled_seconds,
    simulated_seconds,
)

from moesaic.core.errors import UserError
from moesaic.moe.adaptive_dispatcher import LinearCost


def _stage(alpha: float, total: float) -> StageCost:
    """A stage of ``total`` seconds for all rows and ``alpha`` for each start."""
    return StageCost(LinearCost(alpha, total), 1.0)


def _layer(draw: random.Random, *, inside: bool) -> LayerCost:
    def stage() -> StageCost:
        return _stage(10 ** draw.uniform(-2, 0), 10 ** draw.uniform(-0.5, 1))

    spare = {"all_gather": stage(), "reduce_scatter": stage()} if inside else {}
    return LayerCost(stage(), stage(), **spare, gradient_s=draw.choice([0.0, draw.uniform(0, 20)]))


def test_a_schedule_by_hand() -> None:
    layer = LayerCost(all_to_all=_stage(1, 4), experts=_stage(0.5, 5))
    # two chunks: out 0-3 and 3-6, experts 3-6 and 6-9, home 6-9 and 9-12
    assert simulated_seconds(layer, 2) == 12
    assert simulated_seconds(layer, 1) == 5 + 5.5 + 5
    # with slices: gather 3-4 and 6-7, experts 4-7 and 7-10, scatter 7-8 and 10-11, home to 14
    sliced = LayerCost(
        layer.all_to_all, layer.experts, all_gather=_stage(0, 2), reduce_scatter=_stage(0, 2)
    )
    assert simulated_seconds(sliced, 2) == 14


def test_gradient_traffic_fills_gaps() -> None:
    layer = LayerCost(all_to_all=_stage(0, 2), experts=_stage(0, 8))
    assert simulated_seconds(layer, 2) == 10
    for gradients, expected in ((5, 10), (6, 10), (9, 13)):
        busy = layer.backward(gradient_s=gradients)
        halved = LayerCost(busy.all_to_all, layer.experts, gradient_s=gradients)
        assert simulated_seconds(halved, 2) == expected
        assert modelled_seconds(halved, 2) == expected


@pytest.mark.parametrize("inside", [False, True])
def test_no_simulated_schedule_is_faster_than_the_bound(inside: bool) -> None:
    draw = random.Random(0)
    for _ in range(200):
        layer = _layer(draw, inside=inside)
        for degree in CHUNK_CANDIDATES:
            assert simulated_seconds(layer, degree) >= modelled_seconds(layer, degree) - 1e-9
        assert simulated_seconds(layer, 1) == pytest.approx(modelled_seconds(layer, 1))


@pytest.mark.parametrize("inside", [False, True])
def test_the_model_mostly_selects_the_best_simulated_schedule(inside: bool) -> None:
    draw = random.Random(1)
    layers = [_layer(draw, inside=inside) for _ in range(300)]
    same = sum(
        best_num_chunks(each) == best_num_chunks(each, seconds=simulated_seconds) for each in layers
    )
    assert same >= 0.9 * len(layers)


def test_cheap_starts_give_many_chunks_and_expensive_ones_one() -> None:
    assert best_num_chunks(LayerCost(_stage(0, 1), _stage(0, 2.5))) == 8
    assert best_num_chunks(LayerCost(_stage(5, 1), _stage(5, 1))) == 1


def test_forward_and_backward_may_have_different_numbers() -> None:
    layer = LayerCost(all_to_all=_stage(0.3, 1), experts=_stage(0.05, 2))
    assert best_num_chunks(layer) != best_num_chunks(layer.backward())


def test_times_on_a_line_have_r_squared_one() -> None:
    fitted = fit_cost(
        [1, 10, 100, 1000], [LinearCost(0.5, 0.02).seconds(n) for n in (1, 10, 100, 1000)]
    )
    assert fitted.cost.alpha == pytest.approx(0.5)
    assert fitted.cost.beta == pytest.approx(0.02)
    assert fitted.r_squared == pytest.approx(1)


def test_a_noisy_line_is_the_least_squares_fit() -> None:
    fitted = fit_cost([0, 0, 2, 2], [1, 3, 5, 7])
    assert fitted.cost == LinearCost(2, 2)
    assert fitted.r_squared == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("seconds", "expected"), [([3, 2, 1], LinearCost(2, 0)), ([0, 1, 3], LinearCost(0, 1))]
)
def test_no_cost_is_negative(seconds: list[float], expected: LinearCost) -> None:
    assert fit_cost([0, 1, 2] if expected.beta == 0 else [0.0, 1.0, 3.0], seconds).cost == expected


def test_a_negative_start_is_no_start() -> None:
    fitted = fit_cost([1, 2, 3], [0.5, 2, 3.5])
    assert fitted.cost == LinearCost(0, pytest.approx(15 / 14))


def test_one_size_is_refused() -> None:
    with pytest.raises(UserError, match="2 times of 1 different sizes"):
        fit_cost([4, 4], [1, 2])
