"""Law: a layer is equivariant to the order of tokens unless its capacity limit uses positions."""

import pytest
import torch

from moe.variants import DIM, LAYER_PARTS, SELECTS, layer, mixture, run


@pytest.mark.parametrize("limit", ["dropless", "by-weight"])
@pytest.mark.parametrize("select", SELECTS)
def test_permuting_tokens_permutes_the_output(select, limit):
    if select == "hash" and limit == "by-weight":
        pytest.skip("all weights are one, so positions decide")
    moe = layer(mixture(select, limit)).eval()
    x, order = torch.randn(40, DIM), torch.randperm(40)
    straight, _ = run(moe, x)
    mixed, _ = run(moe, x[order])
    torch.testing.assert_close(mixed, straight[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("body", LAYER_PARTS)
def test_permuting_tokens_permutes_the_output_of_every_moe_layer(body):
    moe = layer(mixture("top2", "dropless").replace(**LAYER_PARTS[body])).eval()
    x, order = torch.randn(40, DIM), torch.randperm(40)
    straight, _ = run(moe, x)
    mixed, _ = run(moe, x[order])
    torch.testing.assert_close(mixed, straight[order], rtol=1e-4, atol=1e-4)


def test_the_order_matters_with_priority_by_position():
    moe = layer(mixture("switch", "by-position")).eval()
    x = torch.randn(40, DIM)
    straight, _ = run(moe, x)
    turned, _ = run(moe, x.flip(0))
    assert not torch.allclose(turned, straight.flip(0))
