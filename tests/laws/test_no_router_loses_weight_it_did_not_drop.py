"""Law: a token's weights change only by the drops that the routing records."""

import pytest
import torch

from moe.variants import DIM, EXPERTS, LIMITS, SELECTS, layer, mixture, run


def _weights(select, limit):
    """Weights and survivors of one routing's edges, and the same without any limit."""
    moe, free = layer(mixture(select, limit)), layer(mixture(select, "dropless"))
    free.load_state_dict(moe.state_dict())
    x = torch.randn(50, DIM)
    found = []
    for one in (moe, free):
        torch.manual_seed(3)
        routing = run(one, x)[1].routing
        found.append(routing)
    limited, full = found
    assert torch.equal(limited.token, full.token)
    assert not full.dropped.any() or select == "gshard-random"
    assert limit == "dropless" or limited.dropped.any()
    return limited, full


def _per_token(routing, values):
    return torch.zeros(50).index_add(0, routing.token, values.float())


# these rescale what is left after drops, one of which it makes itself: see the last law
AFTER_DROPS = ("top3-after", "gshard-random")


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("select", [name for name in SELECTS if name not in AFTER_DROPS])
def test_no_router_loses_weight_it_did_not_drop(select, limit):
    limited, full = _weights(select, limit)
    alive = ~limited.dropped
    torch.testing.assert_close(limited.weight, full.weight * alive)
    works = alive & (limited.expert < EXPERTS)  # a null expert's edge weighs nothing
    assert (limited.weight[works] > 0).all()


@pytest.mark.parametrize("select", ["top2", "gshard", "gshard-sampled", "hash", "dense-all"])
def test_normalised_weights_sum_to_one_where_nothing_is_dropped(select):
    _, full = _weights(select, "dropless")
    torch.testing.assert_close(_per_token(full, full.weight), torch.ones(50))


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("select", AFTER_DROPS)
def test_normalising_after_drops_makes_the_kept_weights_sum_to_the_scale(select, limit):
    limited, _ = _weights(select, limit)
    alive = ~limited.dropped
    survived = (_per_token(limited, alive) > 0).float()
    scale = SELECTS[select].scale
    torch.testing.assert_close(_per_token(limited, limited.weight), survived * scale)
    assert torch.equal(limited.weight > 0, alive)
