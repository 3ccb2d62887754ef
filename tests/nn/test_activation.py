"""Activations compute their formula and say how wide their input is."""

import pytest
import torch
import torch.nn.functional as F

from moesaic.nn.feed_forward import GELU, ReLU, SquaredReLU, SwiGLU

X = torch.randn(5, 8)
WANTED = {
    ReLU(): X.clamp(min=0),
    GELU(): F.gelu(X),
    SquaredReLU(): X.clamp(min=0) ** 2,
    SwiGLU(): X[:, :4] * X[:, :4].sigmoid() * X[:, 4:],
}


@pytest.mark.parametrize("activation", WANTED, ids=repr)
def test_an_activation_is_its_formula(activation):
    got = activation(X)
    torch.testing.assert_close(got, WANTED[activation])
    assert activation.width(got.shape[1]) == X.shape[1]
