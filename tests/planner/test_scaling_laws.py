"""Scaling laws: what the papers state of their own laws, and laws recovered from their own data."""

import random

import pytest

from moesaic.core.errors import DataError, UserError
from moesaic.planner.budget_proposal import propose_for_budget
from moesaic.planner.fit_law import RunPoint, fit_law
from moesaic.planner.scaling_laws import (
    CHINCHILLA,
    GREATER_LEVERAGE,
    ChinchillaLaw,
    expert_model_parameters,
    leverage_optimum,
)

OURS = ChinchillaLaw(1.2, 90.0, 0.31, 240.0, 0.35)
SIZES, TOKENS = (2e5, 6e5, 2e6, 6e6), (3e6, 1e7, 4e7)


def points(noise: float = 0.0) -> list[RunPoint]:
    draw = random.Random(0)
    return [
        RunPoint(f"{n:g}-{d:g}", n, d, OURS.loss(n, tokens=d) * (1 + draw.gauss(0, noise)))
        for n in SIZES
        for d in TOKENS
    ]


def test_the_best_division_of_a_budget_is_the_one_of_least_loss():
    best = CHINCHILLA.optimum(1e21)
    assert 6 * best.parameters * best.tokens == pytest.approx(1e21)
    least = CHINCHILLA.loss(best.parameters, tokens=best.tokens)
    for factor in (0.8, 0.97, 1.03, 1.25):
        assert CHINCHILLA.loss(best.parameters * factor, tokens=best.tokens / factor) > least


def test_chinchillas_70b_on_1_4t_tokens_is_better_than_gophers_280b_on_300b():
    """2203.15556, section 4.2: of the same budget."""
    assert CHINCHILLA.loss(70e9, tokens=1.4e12) < CHINCHILLA.loss(280e9, tokens=300e9)


def test_the_bases_of_the_leverage_law_are_those_with_which_its_two_statements_hold():
    assert GREATER_LEVERAGE.leverage(0.031, granularity=12, flops=1e22) > 7
    assert 8 <= GREATER_LEVERAGE.best_granularity() <= 12
    at = {"granularity": 12, "flops": 1e20}
    shares = [GREATER_LEVERAGE.leverage(share, **at) for share in (0.5, 0.25, 0.06, 0.008)]
    assert shares == sorted(shares)  # fewer experts of a token: more leverage


def test_an_moe_takes_more_tokens_and_fewer_flops_a_token_than_a_dense_model():
    sparse, dense = leverage_optimum(1e21), leverage_optimum(1e21, sparse=False)
    assert sparse.tokens > dense.tokens
    assert sparse.parameters < dense.parameters
    assert 6 * sparse.parameters * sparse.tokens == pytest.approx(1e21, rel=0.01)


def test_experts_in_every_second_layer_multiply_a_third_of_the_parameters():
    assert expert_model_parameters(3.0, experts=4) == 6.0


def test_a_fit_recovers_the_constants_of_the_data():
    found = fit_law(points(), resamples=3).law
    for name in ("entropy", "parameter_exponent", "token_exponent"):
        assert getattr(found, name) == pytest.approx(getattr(OURS, name), rel=0.02), name


def test_a_fit_of_noisy_runs_predicts_runs_that_it_has_not_seen():
    found = fit_law(points(noise=0.003), resamples=12)
    assert len(found.held_out) == 2
    assert found.held_out_error < 0.02
    for name in ("entropy", "token_exponent"):
        low, high = found.intervals[name]
        assert low <= getattr(OURS, name) <= high or abs(low / getattr(OURS, name) - 1) < 0.3


def test_runs_that_do_not_determine_a_law_are_refused():
    with pytest.raises(DataError, match=r"found 5 runs .* expected at least 6"):
        fit_law(points()[:5])
    with pytest.raises(DataError, match="1 different numbers of parameters"):
        fit_law([RunPoint("a", 1e6, d * 1e6, 3.0) for d in range(1, 8)])


def test_every_proposed_value_has_a_paper_and_its_range():
    found = propose_for_budget(1e21)
    values = {value.name: value for value in found.values}
    assert all(value.paper and value.fitted_on for value in found.values)
    assert 1e9 < values["dense: parameters"].value < 1e10
    assert values["learning rate"].value < 1e-3
    with pytest.raises(UserError, match="expected training FLOPs"):
        propose_for_budget(1000)
