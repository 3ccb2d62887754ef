"""Each row meets its own expert."""

import torch

from moesaic.moe.experts import ExpertShape, GroupedExperts
from moesaic.nn.feed_forward import DenseFeedForward, FeedForwardConfig, SwiGLU
from moesaic.ops.permute import group_by_expert

D, E = 8, 3
FEED = FeedForwardConfig(hidden=12, activation=SwiGLU())


def _experts():
    experts = GroupedExperts(ExpertShape(E, D, FEED, bias=True))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    return experts


def test_an_expert_is_a_dense_feed_forward():
    experts, x = _experts(), torch.randn(6, D)
    dense = DenseFeedForward(FEED, dim=D, bias=True)
    dense.load_state_dict(
        {
            "up.weight": experts.up[1].t(),
            "up.bias": experts.up_bias[1],
            "down.weight": experts.down[1].t(),
            "down.bias": experts.down_bias[1],
        }
    )
    groups = group_by_expert(torch.full((6,), 1), num_experts=E)
    torch.testing.assert_close(experts(x, groups=groups), dense(x), rtol=1e-4, atol=1e-4)


def test_autocast_computes_in_half_and_trains_float32_banks():
    experts, x = _experts(), torch.randn(6, D)
    groups = group_by_expert(torch.arange(6) % E, num_experts=E)
    order = groups.order
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = experts(x[order], groups=groups)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert experts.up.grad is not None
    assert experts.up.grad.dtype == torch.float32
