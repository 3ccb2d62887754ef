import math

import pytest
import torch

from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.moe.layer import MoELayer
from moesaic.moe.router_context import RouterState, TokenContext
from moesaic.moe.router_gate import LayerIndex
from moesaic.moe.routing import Routing
from moesaic.moe.routing_record import RoutingRecord
from moesaic.nn.feed_forward import FeedForwardConfig, ReLU

ROUTING = Routing(torch.zeros(2).long(), torch.zeros(2).long(), torch.ones(2), 2, 4)


def record(logits):
    return RoutingRecord("here", ROUTING, TokenContext.unbatched(2), logits=logits)


def test_uniform_logits_have_entropy_one():
    assert record(torch.zeros(2, 4)).router_entropy().item() == pytest.approx(1.0)


def test_one_hot_probabilities_have_entropy_zero():
    assert record(torch.tensor([[60.0, 0, 0, 0]] * 2)).router_entropy().item() < 1e-6


def test_the_logit_scale_is_the_rms_of_logsumexp():
    logits = torch.tensor([[0.0, 0, 0, 0], [3.0, 3, 3, 3]])
    sums = [math.log(4), 3 + math.log(4)]
    expected = math.sqrt(sum(s * s for s in sums) / 2)
    assert record(logits).logit_rms().item() == pytest.approx(expected)


def test_recorded_logits_are_detached():
    layer = MoELayer(
        MoE(experts=4, select=TopK(k=2)),
        dim=8,
        feed_forward=FeedForwardConfig(hidden=16, activation=ReLU()),
        bias=False,
        layer_index=LayerIndex("here"),
    )
    torch.nn.init.normal_(layer.router.gate.weight)
    for bank in (layer.experts.up, layer.experts.down):
        torch.nn.init.normal_(bank)
    output = layer(
        torch.randn(5, 8), context=TokenContext.unbatched(5), router_state=RouterState()
    ).record
    assert output.logits.shape == (5, 4)
    assert not output.logits.requires_grad


def test_without_tokens_there_is_no_scale():
    assert record(torch.zeros(0, 4)).router_entropy() is None
    assert record(None).logit_rms() is None
