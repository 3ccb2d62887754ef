"""Noise is there in training only and within its bounds."""

import torch

from moesaic.moe.router_context import TokenContext
from moesaic.moe.router_noise import Jitter, NoRouterNoise

X = torch.rand(100, 8) + 1


def _read(noise, *, training):
    return noise.apply_to_input(X, context=TokenContext.unbatched(len(X)), training=training)


def test_jitter_stays_within_epsilon_and_moves_something():
    ratio = _read(Jitter(epsilon=0.1), training=True) / X
    assert ratio.min() >= 0.9 - 1e-6
    assert ratio.max() <= 1.1 + 1e-6
    assert ratio.std() > 0.01


def test_without_training_nothing_moves():
    assert _read(Jitter(), training=False) is X
    assert _read(NoRouterNoise(), training=True) is X
