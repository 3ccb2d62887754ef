"""The number of chunks follows from what stages cost."""

import random

import pytest

from moesaic.dist.degrees import CANDIDATES, Layer, Stage, fastest, modelled, simulated
from moesaic.dist.fit import Cost


def _stage(alpha: float, whole: float) -> Stage:
    """A stage that takes ``whole`` seconds for all rows beside ``alpha`` for each start."""
    return Stage(Cost(alpha, whole), 1.0)


def _layer(draw: random.Random, *, inside: bool) -> Layer:
    def stage() -> Stage:
        return _stage(10 ** draw.uniform(-2, 0), 10 ** draw.uniform(-0.5, 1))

    spare = {"gather": stage(), "scatter": stage()} if inside else {}
    return Layer(stage(), stage(), **spare, gradients=draw.choice([0.0, draw.uniform(0, 20)]))


def test_a_schedule_by_hand() -> None:
    layer = Layer(exchange=_stage(1, 4), experts=_stage(0.5, 5))
    # two chunks: out 0-3 and 3-6, experts 3-6 and 6-9, home 6-9 and 9-12
    assert simulated(layer, 2) == 12
    assert simulated(layer, 1) == 5 + 5.5 + 5
    # with slices: gather 3-4 and 6-7, experts 4-7 and 7-10, scatter 7-8 and 10-11, home to 14
    sliced = Layer(layer.exchange, layer.experts, gather=_stage(0, 2), scatter=_stage(0, 2))
    assert simulated(sliced, 2) == 14


def test_traffic_that_fills_gaps_costs_only_what_does_not_fit() -> None:
    layer = Layer(exchange=_stage(0, 2), experts=_stage(0, 8))
    assert simulated(layer, 2) == 10
    for gradients, expected in ((5, 10), (6, 10), (9, 13)):
        busy = layer.backward(gradients=gradients)
        halved = Layer(busy.exchange, layer.experts, gradients=gradients)
        assert simulated(halved, 2) == expected
        assert modelled(halved, 2) == expected


@pytest.mark.parametrize("inside", [False, True])
def test_no_schedule_is_faster_than_the_model_says(inside: bool) -> None:
    draw = random.Random(0)
    for _ in range(200):
        layer = _layer(draw, inside=inside)
        for degree in CANDIDATES:
            assert simulated(layer, degree) >= modelled(layer, degree) - 1e-9
        assert simulated(layer, 1) == pytest.approx(modelled(layer, 1))


@pytest.mark.parametrize("inside", [False, True])
def test_the_model_chooses_what_trying_everything_would(inside: bool) -> None:
    draw = random.Random(1)
    layers = [_layer(draw, inside=inside) for _ in range(300)]
    same = sum(fastest(each) == fastest(each, seconds=simulated) for each in layers)
    assert same >= 0.9 * len(layers)


def test_what_starts_for_nothing_is_cut_often_and_what_starts_dearly_never() -> None:
    assert fastest(Layer(_stage(0, 1), _stage(0, 2.5))) == 8
    assert fastest(Layer(_stage(5, 1), _stage(5, 1))) == 1


def test_the_passes_may_differ() -> None:
    layer = Layer(exchange=_stage(0.3, 1), experts=_stage(0.05, 2))
    assert fastest(layer) != fastest(layer.backward())
