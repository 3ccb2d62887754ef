"""Every balance term equals its formula on the whole batch for any split over ranks."""

import math

import pytest
import torch
import torch.nn.functional as F

from moe.balance_cases import EXPERTS, LENGTHS, TOKENS, balance_inputs, shares
from moesaic.moe.adaptive_auxiliary_losses import AdaptiveBalance
from moesaic.moe.auxiliary_losses import (
    DeviceBalance,
    EntropyBalance,
    FirstChoiceBalance,
    GlobalBatchBalance,
    ImportanceBalance,
    MicroBatchBalance,
    RouterZLoss,
    SequenceBalance,
    SwitchBalance,
)
from moesaic.moe.expert_bias import BiasUpdate
from moesaic.moe.expert_selection import TopK


def chosen(logits):
    """1.0 where a token takes an expert."""
    return torch.zeros_like(logits).scatter(1, logits.topk(2, -1).indices, 1.0)


def switch(logits):
    f, p = chosen(logits).mean(0) / 2, logits.softmax(-1).mean(0)
    return EXPERTS * sum(f[e] * p[e] for e in range(EXPERTS))


def first_choices(logits):
    """fairseq's ``l_aux``: the mean of ``me * ce``, times the experts squared."""
    me, ce = logits.softmax(-1).mean(0), F.one_hot(logits.argmax(-1), EXPERTS).float().mean(0)
    return (me * ce).mean() * EXPERTS**2


def by_row(logits):
    rows = logits.split(LENGTHS)
    return sum(switch(row) for row in rows) / len(rows)


def by_device(logits):
    f = EXPERTS / (2 * TOKENS) * chosen(logits).sum(0)
    p = logits.softmax(-1).mean(0)
    groups = range(0, EXPERTS, 2)
    return sum((f[g] + f[g + 1]) / 2 * (p[g] + p[g + 1]) for g in groups)


def importance(logits):
    taken = chosen(logits).bool()
    gates = logits.masked_fill(~taken, -math.inf).softmax(-1).sum(0)
    return (gates.std(correction=0) / gates.mean()) ** 2


def entropy(logits):
    return torch.distributions.Categorical(logits=logits).entropy().mean()


CASES = {
    "switch": (SwitchBalance(weight=0.3), switch),
    "first-choice": (FirstChoiceBalance(weight=0.3), first_choices),
    "z": (RouterZLoss(weight=0.3), lambda x: x.logsumexp(-1).square().mean()),
    "sequence": (SequenceBalance(weight=0.3), by_row),
    "device": (DeviceBalance(weight=0.3, num_groups=4), by_device),
    "importance": (ImportanceBalance(weight=0.3), importance),
    "entropy": (EntropyBalance(weight=0.3), entropy),
    "adaptive": (AdaptiveBalance(weight=0.3), switch),
    "global-batch": (GlobalBatchBalance(weight=0.3), switch),
    "bias": (BiasUpdate(), lambda x: 0.0 * x.sum()),
}
SHARED_OUT = {"alone": [6], "two": [2, 4], "four": [1, 0, 3, 2]}


@pytest.mark.parametrize("ranks", SHARED_OUT)
@pytest.mark.parametrize("name", CASES)
def test_shares_add_up_to_the_formula_on_the_whole_batch_with_gradients(name, ranks):
    term, formula = CASES[name]
    logits = torch.randn(TOKENS, EXPERTS, requires_grad=True)
    want = 0.3 * formula(logits)
    got = torch.stack(shares(term, logits, rows=SHARED_OUT[ranks])).sum()
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(x, logits)[0] for x in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)


EVEN = ["switch", "sequence", "device", "adaptive", "global-batch"]


@pytest.mark.parametrize("name", EVEN)
def test_perfectly_balanced_routing_gives_exactly_the_weight(name):
    row = 20 * (torch.eye(EXPERTS) + torch.eye(EXPERTS).roll(1, 0))
    logits = row.repeat(4, 1)
    term = CASES[name][0]
    loss = term(balance_inputs(logits, lengths=[EXPERTS, 3 * EXPERTS], term=term))
    torch.testing.assert_close(loss, torch.tensor(0.3))


@pytest.mark.parametrize("name", [*EVEN, "importance"])
def test_a_collapse_costs_more_than_balance(name):
    logits = torch.zeros(TOKENS, EXPERTS)
    logits[:, :2] = 30.0
    assert CASES[name][0](balance_inputs(logits, term=CASES[name][0])) > 0.3 * 1.9


@pytest.mark.parametrize("name", [*CASES, "micro-batch"])
def test_a_batch_without_tokens_costs_nothing_and_lets_gradients_through(name):
    term = MicroBatchBalance() if name == "micro-batch" else CASES[name][0]
    logits = torch.zeros(0, EXPERTS, requires_grad=True)
    loss = term(balance_inputs(logits, lengths=[], term=term))
    assert loss.item() == 0
    loss.backward()


def test_balance_within_rows_is_stricter_than_balance_of_the_batch():
    experts = torch.arange(4).repeat_interleave(4)  # each row takes one expert, all are used
    logits = 30 * torch.nn.functional.one_hot(experts, 4).float()
    scores = balance_inputs(logits, lengths=[4] * 4, select=TopK(k=1))
    torch.testing.assert_close(SwitchBalance(weight=1)(scores), torch.tensor(1.0))
    torch.testing.assert_close(SequenceBalance(weight=1)(scores), torch.tensor(4.0))


def test_device_balance_is_independent_of_the_load_within_a_group():
    logits = torch.full((16, 4), -30.0)
    logits[::2, 0] = logits[1::2, 3] = 30.0  # one expert of each pair
    scores = balance_inputs(logits, lengths=[16], select=TopK(k=1))
    torch.testing.assert_close(SwitchBalance(weight=1)(scores), torch.tensor(2.0))
    torch.testing.assert_close(DeviceBalance(weight=1)(scores), torch.tensor(1.0))


def test_the_entropy_of_a_one_hot_router_has_a_finite_gradient():
    logits = torch.tensor([[300.0, 0.0, -300.0]], requires_grad=True)
    EntropyBalance()(balance_inputs(logits, lengths=[1])).backward()
    assert logits.grad.isfinite().all()
