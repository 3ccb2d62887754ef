"""Balance terms have their published values, and shares of ranks add up."""

import pytest
import torch

from moesaic.moe.auxiliary_losses import BalanceInputs, RouterZLoss, SwitchBalance
from moesaic.moe.batch_group import SingleRankBatch
from moesaic.moe.expert_selection import SwitchTop1, TopK
from moesaic.moe.router_context import RouterContext

T, E = 64, 8


def _scores(logits, select=None, *, load=None):
    """The balance inputs of one rank; ``load`` is that of all ranks, of T tokens."""
    rule, gate = select or SwitchTop1(), RouterContext.from_logits(logits, training=True)
    routing = rule(gate)
    load = routing.load().double() if load is None else load
    tokens = torch.tensor(float(T), dtype=torch.float64)
    none = torch.zeros_like(load)
    return BalanceInputs(
        gate, routing, rule.probabilities(gate), load, none, tokens, SingleRankBatch()
    )


@pytest.mark.parametrize("k", [1, 2])
def test_the_switch_loss_is_its_weight_when_balanced(k):
    logits = 20 * torch.eye(E).repeat(T // E, 1)
    logits = logits + 20 * torch.eye(E).roll(1, 0).repeat(T // E, 1) * (k - 1)
    loss = SwitchBalance(weight=0.02)(_scores(logits, TopK(k=k)))
    torch.testing.assert_close(loss, torch.tensor(0.02))


def test_the_switch_loss_is_experts_times_its_weight_when_collapsed():
    logits = torch.zeros(T, E)
    logits[:, 3] = 50.0
    torch.testing.assert_close(SwitchBalance(weight=0.01)(_scores(logits)), torch.tensor(0.08))


def test_the_switch_loss_equals_its_formula_and_differentiates_only_probabilities():
    logits = torch.randn(T, E, requires_grad=True)
    scores = _scores(logits)
    fraction = torch.stack([(logits.argmax(-1) == e).float().mean() for e in range(E)])
    want = 0.01 * E * (fraction * logits.softmax(-1).mean(0)).sum()
    got = SwitchBalance()(scores)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(x, logits)[0] for x in (got, want)]
    torch.testing.assert_close(*grads)


def test_the_z_loss_equals_its_formula():
    logits = torch.randn(T, E)
    want = 0.5 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(RouterZLoss(weight=0.5)(_scores(logits)), want)


@pytest.mark.parametrize("term", [SwitchBalance(), RouterZLoss()], ids=repr)
def test_shares_of_unequal_ranks_add_up_with_gradients(term):
    logits = torch.randn(T, E, requires_grad=True)
    whole = term(_scores(logits))
    (want,) = torch.autograd.grad(whole, logits)
    load = _scores(logits).load
    shares = [term(_scores(part, load=load)) for part in logits.split([10, 50, 4, 0])]
    total = torch.stack(shares).sum()
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(torch.autograd.grad(total, logits)[0], want)
