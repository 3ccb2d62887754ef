"""Routing replay uses recorded routes in place of the routers' selection."""

import pytest
import torch

from moesaic.core.errors import UserError
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.moe.layer import moe_layers
from moesaic.moe.routing_record import routes_from_records
from moesaic.moe.routing_replay import replay_routing
from moesaic.testing.tiny_models import random_batch, tiny_model_config

BATCH = random_batch(3, seed=0)


def model(seed: int, *, experts: int = 4):
    torch.manual_seed(seed)
    return Transformer(tiny_model_config(moe=MoE(experts=experts, select=TopK(k=2)))).eval()


def recorded(made):
    return routes_from_records(made(BATCH).records, language=BATCH.groups["target_language"])


def test_replaying_a_models_own_routes_gives_the_same_output() -> None:
    made = model(0)
    with replay_routing(made, recorded(made)):
        assert torch.equal(made(BATCH).hidden, model(0)(BATCH).hidden)


def test_routes_of_another_model_are_used_inside_the_context_only() -> None:
    mine, others = model(0), recorded(model(1))
    own = recorded(mine)
    assert not all(
        torch.equal(a.routing.expert, b.routing.expert) for a, b in zip(own, others, strict=True)
    )
    names = list(mine.state_dict())
    with replay_routing(mine, others):
        output = mine(BATCH)
        assert list(mine.state_dict()) == names
    for record, found in zip(output.records, others, strict=True):
        assert torch.equal(record.routing.expert, found.routing.expert)
        assert torch.equal(record.routing.weight, found.routing.weight)
    after = recorded(mine)
    for one, other in zip(own, after, strict=True):
        assert torch.equal(one.routing.expert, other.routing.expert)


def test_a_layer_without_recorded_routes_uses_its_router() -> None:
    mine, others = model(0), recorded(model(1))
    with replay_routing(mine, [found for found in others if found.layer == "encoder.0"]):
        encoder, decoder = mine(BATCH).records
    assert torch.equal(encoder.routing.expert, others[0].routing.expert)
    assert not torch.equal(decoder.routing.expert, others[1].routing.expert)


def test_gradients_reach_the_experts_but_no_router() -> None:
    mine = model(0)
    with replay_routing(mine, recorded(model(1))):
        mine(BATCH).hidden.square().sum().backward()
    for layer in moe_layers(mine):
        assert layer.experts.up.grad.abs().sum() > 0
        grad = layer.router.gate.weight.grad
        assert grad is None or not grad.any()


def test_the_routes_of_other_tokens_or_other_experts_are_refused() -> None:
    mine = model(0)
    other = routes_from_records(
        mine(random_batch(3, seed=1)).records, language=torch.zeros(3, dtype=torch.long)
    )
    with replay_routing(mine, other), pytest.raises(UserError, match="other tokens"):
        mine(BATCH)
    with (
        replay_routing(mine, recorded(model(0, experts=5))),
        pytest.raises(UserError, match="5 exp"),
    ):
        mine(BATCH)
    with replay_routing(mine, other), pytest.raises(UserError):
        mine(BATCH)
    mine(BATCH)
