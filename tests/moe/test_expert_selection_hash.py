"""A hash of the token id selects the expert, with a different hash in each layer."""

from dataclasses import replace

import torch

from moesaic.moe.expert_selection import Hash
from moesaic.moe.router_context import RouterContext, TokenContext

E = 8


def _route(token, *, layer="encoder.1"):
    context = replace(TokenContext.unbatched(len(token)), token=token).for_layer(layer)
    return Hash()(RouterContext(torch.randn(len(token), E), context))


def test_an_id_has_the_same_expert_at_every_position():
    token = torch.randint(0, 500, (300,))
    expert, order = _route(token).expert, torch.randperm(300)
    assert torch.equal(_route(token[order]).expert, expert[order])
    assert torch.equal(_route(token).weight, torch.ones(300))


def test_another_layer_has_another_hash():
    token = torch.arange(1000)
    same = _route(token).expert == _route(token, layer="encoder.3").expert
    assert 0.05 < same.float().mean() < 0.25  # one in eight by chance


def test_ids_are_spread_over_all_experts():
    load = _route(torch.arange(8000)).load()
    assert load.min() > 850
    assert load.max() < 1150


def test_hashes_of_ids_are_stable():
    assert _route(torch.arange(5, 13)).expert.tolist() == [0, 7, 2, 0, 2, 1, 4, 1]
