"""Law: what a token's edges weigh changes only by the drops that the routing shows."""

import pytest
import torch

from moe.variants import DIM, LIMITS, SELECTS, layer, mixture, run


def _weights(select, limit):
    """Weights [token, choice] and survivors of one routing, and the same without any limit."""
    moe, free = layer(mixture(select, limit)), layer(mixture(select, "dropless"))
    free.load_state_dict(moe.state_dict())
    x = torch.randn(50, DIM)
    found = []
    for one in (moe, free):
        torch.manual_seed(3)
        routing = run(one, x)[1].routing
        found.append((routing.weight.view(50, -1), ~routing.dropped.view(50, -1)))
    (weight, alive), (full, everyone) = found
    assert everyone.all()
    assert limit == "dropless" or not alive.all()
    return weight, alive, full


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("select", [name for name in SELECTS if name != "top3-after"])
def test_no_router_loses_weight_it_did_not_drop(select, limit):
    weight, alive, full = _weights(select, limit)
    torch.testing.assert_close(weight, full * alive)
    assert (weight[alive] > 0).all()


@pytest.mark.parametrize("select", ["top2", "gshard", "gshard-sampled"])
def test_normalised_weights_sum_to_one_where_nothing_is_dropped(select):
    weight, _, _ = _weights(select, "dropless")
    torch.testing.assert_close(weight.sum(1), torch.ones(50))


@pytest.mark.parametrize("limit", LIMITS)
def test_normalising_after_drops_gives_the_survivors_everything(limit):
    weight, alive, _ = _weights("top3-after", limit)
    torch.testing.assert_close(weight.sum(1), alive.any(1).float())
    assert torch.equal(weight > 0, alive)
