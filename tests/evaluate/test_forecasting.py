"""Forecasts of any horizon: the pieces, and the roll-out of a predictor that knows the future."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.evaluate.forecasting import forecast, forecast_pieces, seasonal_naive


@given(horizon=st.integers(1, 300), horizons=st.sets(st.sampled_from([1, 2, 3, 8, 32, 64])))
def test_forecast_pieces_are_horizons_longest_first_and_sum_to_any_horizon(horizon, horizons):
    horizons = tuple({1} | horizons)
    pieces = forecast_pieces(horizon, horizons=horizons)
    assert sum(pieces) == horizon
    assert set(pieces) <= set(horizons)
    assert pieces == sorted(pieces, reverse=True)
    for piece, left in zip(pieces, horizon - np.cumsum([0, *pieces[:-1]]), strict=True):
        assert piece == max(h for h in horizons if h <= left)


def test_without_a_horizon_of_one_the_last_piece_passes_the_end():
    assert forecast_pieces(21, horizons=(8, 16)) == [16, 8]


@pytest.mark.parametrize("horizon", [1, 7, 8, 45])
def test_a_predictor_of_the_true_future_gives_it_at_every_horizon(horizon):
    def predict(known, piece):
        return known[:, -1:] + torch.arange(1, piece + 1)

    context = torch.arange(6.0)[None] + torch.tensor([[0.0], [100.0]])
    found = forecast(context, predict=predict, horizon=horizon, horizons=(2, 8, 32))
    assert torch.equal(found, context[:, -1:] + torch.arange(1, horizon + 1))


def test_the_seasonal_naive_forecast_repeats_the_last_period():
    context = torch.arange(6.0)[None]
    assert seasonal_naive(context, horizon=5, period=3)[0].tolist() == [3, 4, 5, 3, 4]
