"""The term is the negative mutual information of tokens and experts."""

import math

import pytest
import torch

from moe.balance_shares import value_and_gradient
from moesaic.moe.auxiliary_losses import MutualInformationBalance
from moesaic.moe.expert_selection_dynamic import DenseAll

T, E = 30, 5
TERM = MutualInformationBalance(weight=0.3)


def _by_hand(logits):
    p = logits.softmax(-1)
    m = p.mean(0)
    return 0.3 * ((m * m.log()).sum() - (p * p.log()).sum(-1).mean())


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_shares_add_up_to_the_formula_in_value_and_gradient(parts):
    logits = torch.randn(T, E)
    value, gradient = value_and_gradient(TERM, logits, select=DenseAll(), parts=parts)
    leaf = logits.clone().requires_grad_()
    want = _by_hand(leaf)
    torch.testing.assert_close(value, want.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(want, leaf)[0])


def test_it_is_minimal_for_one_hot_tokens_and_balanced_experts():
    sure = 80 * torch.eye(E).repeat(6, 1)
    value, gradient = value_and_gradient(TERM, sure, select=DenseAll())
    assert float(value) == pytest.approx(-0.3 * math.log(E), rel=1e-6)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("logits", [torch.zeros(T, E), 300 * torch.eye(E)[:1].repeat(T, 1)])
def test_it_is_zero_if_tokens_and_experts_are_independent(logits):
    value, gradient = value_and_gradient(TERM, logits, select=DenseAll())
    assert float(value) == pytest.approx(0, abs=1e-6)
    assert gradient.isfinite().all()
