"""Activations compute their formula; a dense feed-forward is two products around one."""

import math

import pytest
import torch
import torch.nn.functional as F

from moesaic.nn.feed_forward import (
    GEGLU,
    GELU,
    ClampedSwiGLU,
    DenseFeedForward,
    FeedForwardConfig,
    ReGLU,
    ReLU,
    SquaredReLU,
    SwiGLU,
    TanhGELU,
)

X = torch.randn(5, 8)
TANH = (1 + torch.tanh((2 / math.pi) ** 0.5 * (X + 0.044715 * X**3))) / 2
WANTED = {
    ReLU(): X.clamp(min=0),
    GELU(): F.gelu(X),
    SquaredReLU(): X.clamp(min=0) ** 2,
    ClampedSwiGLU(alpha=2.0, limit=0.5): (
        X[:, :4].clamp(max=0.5)
        * (2 * X[:, :4].clamp(max=0.5)).sigmoid()
        * (X[:, 4:].clamp(-0.5, 0.5) + 1)
    ),
    SwiGLU(): X[:, :4] * X[:, :4].sigmoid() * X[:, 4:],
    TanhGELU(): X * TANH,
    GEGLU(): F.gelu(X[:, :4]) * X[:, 4:],
    GEGLU(form="tanh"): (X * TANH)[:, :4] * X[:, 4:],
    ReGLU(): X[:, :4].clamp(min=0) * X[:, 4:],
}


@pytest.mark.parametrize("activation", WANTED, ids=repr)
def test_an_activation_is_its_formula(activation):
    got = activation(X)
    torch.testing.assert_close(got, WANTED[activation])
    assert activation.width(got.shape[1]) == X.shape[1]


def test_it_is_down_of_activation_of_up():
    module = DenseFeedForward(FeedForwardConfig(hidden=6, activation=SwiGLU()), dim=4, bias=True)
    x = torch.randn(3, 4)
    inner = x @ module.up.weight.t() + module.up.bias
    want = SwiGLU()(inner) @ module.down.weight.t() + module.down.bias
    torch.testing.assert_close(module(x), want)
    assert module.up.weight.shape == (12, 4)
