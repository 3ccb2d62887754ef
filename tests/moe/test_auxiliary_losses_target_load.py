"""The term moves the share of kept tokens to its target."""

import pytest
import torch

from moe.balance_shares import value_and_gradient
from moesaic.moe.auxiliary_losses import TargetLoadBalance
from moesaic.moe.expert_selection_dynamic import Threshold

T, E = 24, 3
SELECT = Threshold(p=0.5)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_shares_add_up_to_the_squared_miss_with_the_gradient_of_the_mean_score(parts):
    logits = torch.randn(T, E)
    term = TargetLoadBalance(target=0.3, weight=2.0)
    value, gradient = value_and_gradient(term, logits, select=SELECT, parts=parts)
    miss = (logits > 0).float().mean(0) - 0.3
    torch.testing.assert_close(value, 2.0 * miss.square().mean())
    leaf = logits.clone().requires_grad_()
    stands_in = 2.0 * (2 * miss * leaf.sigmoid().mean(0)).mean()
    torch.testing.assert_close(gradient, torch.autograd.grad(stands_in, leaf)[0])


@pytest.mark.parametrize("target", [0.25, 0.75])
def test_descending_it_reaches_the_target(target):
    logits = torch.randn(200, 1)
    for _ in range(400):
        _, gradient = value_and_gradient(TargetLoadBalance(target=target), logits, select=SELECT)
        logits = logits - 20 * gradient
    assert float((logits > 0).float().mean()) == pytest.approx(target, abs=0.03)
