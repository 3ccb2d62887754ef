"""Law: an MoE layer is the sum over edges of weight * expert(token), values and gradients."""

import pytest
import torch

from moe.variants import DIM, EXPERTS, LIMITS, SELECTS, layer, mixture, run
from moesaic.moe.layer import MoELayer
from moesaic.moe.routing import Routing


def definition(moe: MoELayer, x: torch.Tensor, routing: Routing) -> torch.Tensor:
    experts = moe.experts
    out = torch.zeros_like(x)
    edges = zip(routing.token.tolist(), routing.expert.tolist(), routing.weight, strict=True)
    for token, expert, weight in edges:
        if expert < len(experts.up):  # neither dropped nor spare
            inputs = moe.weights_on == "inputs"
            hidden = (weight * x[token] if inputs else x[token]) @ experts.up[expert]
            hidden = hidden + experts.up_bias[expert] if experts.bias else hidden
            answer = experts.activation(hidden) @ experts.down[expert]
            answer = answer + experts.down_bias[expert] if experts.bias else answer
            answer = answer if inputs else weight * answer
            out = out.index_add(0, torch.tensor([token]), answer[None])
    return out


def _agree(moe: MoELayer, x: torch.Tensor) -> None:
    leaves = [x, *moe.parameters()]
    weigh = torch.randn(x.shape)
    results = []
    for by_hand in (False, True):
        torch.manual_seed(7)  # the same noise and the same random drops
        out, record = run(moe, x)
        if by_hand:
            out = definition(moe, x, record.routing)
        grads = torch.autograd.grad((out * weigh).sum(), leaves, allow_unused=True)
        filled = [
            torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=True)
        ]
        results.append([out, *filled])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("select", SELECTS)
def test_a_layer_equals_its_definition(select, limit):
    _agree(layer(mixture(select, limit)), torch.randn(31, DIM, requires_grad=True))


@pytest.mark.parametrize("limit", ["dropless", "by-weight"])
@pytest.mark.parametrize("select", ["sigmoid-none", "switch", "top-p"])
def test_a_layer_with_weights_on_inputs_equals_its_definition(select, limit):
    config = mixture(select, limit).replace(weights_on="inputs")
    _agree(layer(config, bias=True), torch.randn(31, DIM, requires_grad=True))


@pytest.mark.parametrize("tokens", [1, 2, 64])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_a_layer_equals_its_definition_at_any_size(tokens, bias):
    moe = layer(mixture("top2", "dropless"), gated=False, bias=bias)
    _agree(moe, torch.randn(tokens, DIM, requires_grad=True))


def test_a_layer_equals_its_definition_when_all_tokens_want_one_expert():
    moe = layer(mixture("switch", "dropless"))
    x = torch.randn(20, DIM).abs().requires_grad_()
    with torch.no_grad():
        moe.router.gate.weight.zero_()[EXPERTS - 1] = 1.0
    assert run(moe, x)[1].routing.load().tolist() == [0] * (EXPERTS - 1) + [20]
    _agree(moe, x)


def test_a_layer_equals_its_definition_on_strided_input():
    wide = torch.randn(31, 2 * DIM)
    x = wide[:, ::2].detach().requires_grad_()
    assert not x.is_contiguous()
    _agree(layer(mixture("top2", "dropless")), x)
