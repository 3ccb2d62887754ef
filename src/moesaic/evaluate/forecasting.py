"""Forecasting: any horizon from a model with a few, and the forecast that models are held against.

Letters: B rows, S points of a context.
"""

from collections.abc import Callable

import torch

from moesaic.core.shapes import Float, Tensor

# from a context [B, S] and a horizon of the model to a forecast [B, horizon]
PredictHorizon = Callable[[Tensor, int], Tensor]


def forecast_pieces(horizon: int, *, horizons: tuple[int, ...]) -> list[int]:
    """Return the horizons that a forecast of ``horizon`` points is made of, longest first.

    Greedy multi-resolution scheduling (Time-MoE, 2409.16040, section 3.2.3): each step takes the
    longest of the model's ``horizons`` that does not pass the end. If the shortest is longer than
    what is left, it is taken and its forecast is cut.
    """
    pieces: list[int] = []
    left = horizon
    while left > 0:
        fitting = [h for h in horizons if h <= left]
        pieces.append(max(fitting) if fitting else min(horizons))
        left -= pieces[-1]
    return pieces


@torch.no_grad()
def forecast(
    context: Float[Tensor, "B S"],
    *,
    predict: PredictHorizon,
    horizon: int,
    horizons: tuple[int, ...],
) -> Float[Tensor, "B horizon"]:
    """Return the next ``horizon`` points: each piece is predicted from all points before it.

    The context keeps its length, so that ``predict`` never reads more points than it was given.
    """
    known = context
    for piece in forecast_pieces(horizon, horizons=horizons):
        known = torch.cat([known, predict(known[:, -context.shape[1] :], piece)], dim=1)
    return known[:, context.shape[1] :][:, :horizon]


def seasonal_naive(
    context: Float[Tensor, "B S"], *, horizon: int, period: int
) -> Float[Tensor, "B horizon"]:
    """Return the forecast that repeats the last ``period`` points (1: the last point)."""
    index = torch.arange(horizon, device=context.device) % period
    return context[:, context.shape[1] - period + index]
