"""Norms give unit vectors."""

import pytest
import torch

from moesaic.nn.norm import LayerNorm, RMSNorm


@pytest.mark.parametrize("norm", [RMSNorm(), LayerNorm(), LayerNorm(bias=True)], ids=repr)
def test_a_norm_gives_vectors_of_unit_size(norm):
    module = norm.build(16)
    out = module(torch.randn(5, 16) * 7)
    torch.testing.assert_close(out.square().mean(-1), torch.ones(5), rtol=1e-3, atol=1e-3)
