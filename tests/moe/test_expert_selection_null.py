"""Edges to null experts have weight zero; weights are normalised over true experts."""

import torch

from moesaic.moe.expert_selection import NullTopK
from moesaic.moe.router_context import RouterContext, TokenContext

T, TRUE, NULL = 60, 4, 3


def _route(logits, k=3):
    context = TokenContext.unbatched(len(logits))
    return NullTopK(k=k)(RouterContext(logits, context, training=True, num_null_experts=NULL))


def test_weights_are_normalised_over_the_true_experts_among_the_k():
    logits = torch.randn(T, TRUE + NULL)
    routing = _route(logits)
    expert, weight = routing.expert.view(T, 3), routing.weight.view(T, 3)
    assert torch.equal(expert, logits.topk(3).indices)
    true = expert < TRUE
    p = logits.softmax(-1).gather(-1, expert) * true
    torch.testing.assert_close(weight, p / p.sum(-1, keepdim=True).clamp(min=1e-9))
    assert 0 < true.sum() < 3 * T


def test_a_token_with_null_experts_only_has_zero_weights():
    logits = torch.zeros(2, TRUE + NULL)
    logits[0, TRUE:] = 5.0
    logits.requires_grad_()
    routing = _route(logits)
    assert routing.weight.view(2, 3)[0].tolist() == [0, 0, 0]
    routing.weight.square().sum().backward()
    assert logits.grad.isfinite().all()
    assert torch.equal(logits.grad[0], torch.zeros(TRUE + NULL))


def test_it_requires_null_experts_and_at_least_k_experts():
    assert "ZeroExperts" in NullTopK(k=2).problems(4, 0)
    assert "at least 6" in NullTopK(k=6).problems(5, 1)
    assert NullTopK(k=5).problems(5, 1) is None


def test_gradients_are_those_of_the_formula():
    logits = torch.randn(5, TRUE + NULL, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: _route(x, k=4).weight, [logits])
