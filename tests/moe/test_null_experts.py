"""Null experts are selected like others and are not dispatched."""

import pytest
import torch

from moe.variants import DIM, EXPERTS, layer, run
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.moe.null_experts import IdentityExperts, NoNullExperts, ZeroExperts, drop_null_edges

X = torch.randn(30, DIM)


def _layer(null_experts):
    return layer(MoE(experts=EXPERTS, select=TopK(k=2), null_experts=null_experts))


def test_edges_to_null_experts_are_counted_but_not_dispatched():
    moe = _layer(ZeroExperts(number=3))
    routing = run(moe, X)[1].routing
    assert routing.num_experts == EXPERTS + 3
    carried = drop_null_edges(routing, num_null_experts=3)
    assert carried.num_experts == EXPERTS
    assert carried.dropped.sum() == (routing.expert >= EXPERTS).sum() > 0
    assert drop_null_edges(routing, num_null_experts=0) is routing


def test_a_zero_expert_returns_zero():
    moe = _layer(ZeroExperts(number=2))
    with torch.no_grad():
        moe.router.gate.weight[:EXPERTS] = 0
        moe.router.gate.weight[EXPERTS:] = 1  # all choices of tokens with a positive sum
    out, _ = run(moe, X.abs())
    assert torch.equal(out, torch.zeros_like(out))


def test_an_identity_expert_returns_its_token_times_the_weight():
    moe = _layer(IdentityExperts(number=2))
    with torch.no_grad():
        moe.router.gate.weight[:EXPERTS] = 0
        moe.router.gate.weight[EXPERTS:] = 1
    out, _ = run(moe, X.abs())
    torch.testing.assert_close(out, X.abs())  # two weights that sum to one


@pytest.mark.parametrize(
    "null_experts", [ZeroExperts(number=2), IdentityExperts(number=2)], ids=repr
)
def test_selecting_a_null_expert_gives_the_router_a_gradient(null_experts):
    moe = _layer(null_experts)
    run(moe, X)[0].square().sum().backward()
    assert moe.router.gate.weight.grad[EXPERTS:].abs().sum() > 0
    assert NoNullExperts().count() == 0
