"""Law: the order of tokens means nothing to a layer whose limit does not look at positions."""

import pytest
import torch

from moe.variants import DIM, SELECTS, layer, mixture, rows_of


@pytest.mark.parametrize("limit", ["dropless", "by-weight"])
@pytest.mark.parametrize("select", SELECTS)
def test_permuting_tokens_permutes_the_output(select, limit):
    moe = layer(mixture(select, limit)).eval()
    x, order = torch.randn(40, DIM), torch.randperm(40)
    straight, _ = moe(x, row=rows_of(40))
    mixed, _ = moe(x[order], row=rows_of(40))
    torch.testing.assert_close(mixed, straight[order], rtol=1e-4, atol=1e-5)


def test_the_order_matters_only_where_position_decides():
    moe = layer(mixture("switch", "by-position")).eval()
    x = torch.randn(40, DIM)
    straight, _ = moe(x, row=rows_of(40))
    turned, _ = moe(x.flip(0), row=rows_of(40))
    assert not torch.allclose(turned, straight.flip(0))
