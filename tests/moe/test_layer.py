"""An MoE layer computes its output and records its routing."""

from dataclasses import replace

import torch
from torch import nn

from moesaic.moe.config import MoE
from moesaic.moe.layer import MoELayer
from moesaic.moe.router_context import RouterState, TokenContext
from moesaic.moe.router_gate import LayerIndex
from moesaic.nn.feed_forward import FeedForwardConfig

D = 8


def _layer(**fields):
    config = MoE(experts=4, **fields)
    layer = MoELayer(
        config,
        dim=D,
        feed_forward=FeedForwardConfig(hidden=12),
        bias=False,
        layer_index=LayerIndex("x.1"),
    )
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def test_experts_may_have_their_own_width():
    assert _layer(hidden=5).experts.down.shape == (4, 5, D)
    assert _layer().experts.down.shape == (4, 12, D)


def test_the_record_names_the_layer_and_the_rows():
    row = torch.tensor([0, 0, 1, 2])
    context = replace(TokenContext.unbatched(4), row=row)
    answer = _layer()(torch.randn(4, D), context=context, router_state=RouterState())
    out, record = answer.out, answer.record
    assert out.shape == (4, D)
    assert record.layer == "x.1"
    assert record.row is row
    assert record.routing.num_tokens == 4


def test_no_tokens_pass_through_and_can_be_differentiated():
    layer = _layer()
    answer = layer(torch.randn(0, D), context=TokenContext.unbatched(0), router_state=RouterState())
    out, record = answer.out, answer.record
    (out.sum() + sum(record.losses.values())).backward()
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in layer.parameters())
