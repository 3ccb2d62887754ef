"""Sigmoid top-k selects with the bias, weights without it, and is stable."""

from dataclasses import replace

import pytest
import torch

from moesaic.moe.auxiliary_losses import BalanceInputs, SwitchBalance
from moesaic.moe.batch_group import SingleRankBatch
from moesaic.moe.expert_selection import SigmoidTopK
from moesaic.moe.router_context import RouterContext

T, E = 40, 6


def test_weights_are_the_chosen_scores_over_their_sum_times_the_scale():
    logits = torch.randn(T, E)
    routing = SigmoidTopK(k=3, scale=2.5)(RouterContext.from_logits(logits))
    score, expert = logits.sigmoid().topk(3)
    assert torch.equal(routing.expert.view(T, 3), expert)
    want = 2.5 * score / score.sum(-1, keepdim=True)
    torch.testing.assert_close(routing.weight.view(T, 3), want)


def test_a_bias_changes_the_selection_and_no_weight():
    logits = torch.tensor([[2.0, 1.0, -1.0]])
    bias = torch.tensor([0.0, 0.0, 5.0])
    routing = SigmoidTopK(k=2)(replace(RouterContext.from_logits(logits), bias=bias))
    assert routing.expert.tolist() == [2, 0]
    score = logits.sigmoid()[0]
    torch.testing.assert_close(routing.weight, score[[2, 0]] / (score[2] + score[0]))


@pytest.mark.parametrize("level", [-200.0, -90.0, 0.0, 90.0])
def test_weights_sum_to_the_scale_where_all_scores_vanish(level):
    logits = (torch.randn(T, E) + level).requires_grad_()
    gate = RouterContext.from_logits(logits, training=True)
    routing = SigmoidTopK(k=2, scale=1.5)(gate)
    sums = routing.weight.view(T, 2).sum(-1)
    torch.testing.assert_close(sums, torch.full((T,), 1.5))
    torch.testing.assert_close(SigmoidTopK().probabilities(gate).sum(-1), torch.ones(T))
    (routing.weight * torch.randn(2 * T)).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("level", [-200.0, -50.0, 0.0])
def test_a_balance_loss_cannot_be_lowered_by_making_all_scores_vanish(level):
    """Megatron-LM issue 1545: 1e-20 in the denominator let the loss go below its minimum."""
    logits = torch.eye(E).repeat(10, 1) + level
    gate, select = RouterContext.from_logits(logits, training=True), SigmoidTopK(k=1)
    routing, p = select(gate), select.probabilities(gate)
    tokens, load = torch.tensor(10.0 * E), routing.load().double()
    scores = BalanceInputs(
        gate, routing, p, load, torch.zeros_like(load), tokens, SingleRankBatch()
    )
    torch.testing.assert_close(SwitchBalance(weight=1.0)(scores), torch.tensor(1.0))


def test_gradients_are_those_of_the_formula():
    logits = torch.randn(5, E, dtype=torch.float64, requires_grad=True)
    rule = SigmoidTopK(k=2, scale=2.0)
    assert torch.autograd.gradcheck(lambda x: rule(RouterContext.from_logits(x)).weight, [logits])
