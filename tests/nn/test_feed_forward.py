"""The dense feed-forward is two products with an activation between."""

import torch

from moesaic.nn.feed_forward import DenseFeedForward, FeedForwardConfig, SwiGLU


def test_it_is_down_of_activation_of_up():
    module = DenseFeedForward(FeedForwardConfig(hidden=6, activation=SwiGLU()), dim=4, bias=True)
    x = torch.randn(3, 4)
    inner = x @ module.up.weight.t() + module.up.bias
    want = SwiGLU()(inner) @ module.down.weight.t() + module.down.bias
    torch.testing.assert_close(module(x), want)
    assert module.up.weight.shape == (12, 4)
