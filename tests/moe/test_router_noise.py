"""Noise is there in training only and within its bounds."""

import torch

from moesaic.moe.noise import Jitter, NoNoise

X = torch.rand(100, 8) + 1


def test_jitter_stays_within_epsilon_and_moves_something():
    ratio = Jitter(epsilon=0.1)(X, training=True) / X
    assert ratio.min() >= 0.9 - 1e-6
    assert ratio.max() <= 1.1 + 1e-6
    assert ratio.std() > 0.01


def test_without_training_nothing_moves():
    assert Jitter()(X, training=False) is X
    assert NoNoise()(X, training=True) is X
