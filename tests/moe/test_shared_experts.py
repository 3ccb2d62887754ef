"""Shared experts are experts that every token takes."""

import torch

from moe.variants import DIM, EXPERTS, HIDDEN, layer, run
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.moe.shared_experts import GatedSharedExperts, SharedExperts
from moesaic.nn.feed_forward import ReLU

ROUTED = MoE(experts=EXPERTS, select=TopK(k=2))
X = torch.randn(9, DIM)


def _mixed(made):
    """The output of the routed experts only."""
    alone = layer(ROUTED, gated=False)
    theirs = {k: v for k, v in made.state_dict().items() if not k.startswith("shared_experts")}
    alone.load_state_dict(theirs)
    return run(alone, X)[0]


def test_shared_experts_are_added_unweighted():
    made = layer(ROUTED.replace(shared_experts=SharedExperts(number=3)), gated=False)
    up, down = (
        made.shared_experts.feed_forward.up.weight,
        made.shared_experts.feed_forward.down.weight,
    )
    wanted = _mixed(made)
    for one in range(3):
        mine = slice(one * HIDDEN, (one + 1) * HIDDEN)
        wanted = wanted + ReLU()(X @ up[mine].t()) @ down[:, mine].t()
    torch.testing.assert_close(run(made, X)[0], wanted, rtol=1e-4, atol=1e-4)


def test_a_gate_weights_the_shared_experts_of_each_token():
    made = layer(ROUTED.replace(shared_experts=GatedSharedExperts(number=2)), gated=False)
    gate = torch.sigmoid(X @ made.shared_experts.gate.weight.t())
    wanted = _mixed(made) + gate * made.shared_experts.feed_forward(X)
    assert gate.shape == (9, 1)
    torch.testing.assert_close(run(made, X)[0], wanted, rtol=1e-4, atol=1e-4)


def test_the_gate_gets_the_gradient_of_its_definition():
    made = layer(ROUTED.replace(shared_experts=GatedSharedExperts()), gated=False)
    weigh = torch.randn(9, DIM)
    (run(made, X)[0] * weigh).sum().backward()
    gate = torch.sigmoid(X @ made.shared_experts.gate.weight.t())
    dot = (made.shared_experts.feed_forward(X) * weigh).sum(1, keepdim=True)
    wanted = (dot * gate * (1 - gate) * X).sum(0, keepdim=True)
    torch.testing.assert_close(made.shared_experts.gate.weight.grad, wanted, rtol=1e-3, atol=1e-3)


def test_shared_experts_are_the_output_if_routed_experts_return_zero():
    made = layer(ROUTED.replace(shared_experts=SharedExperts()), gated=False)
    with torch.no_grad():
        made.experts.down.zero_()
    torch.testing.assert_close(run(made, X)[0], made.shared_experts.feed_forward(X))
