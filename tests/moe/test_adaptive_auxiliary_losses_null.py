"""Null experts are balanced as one, true experts individually, with a decaying weight."""

import pytest
import torch

from moe.balance_shares import value_and_gradient
from moesaic.moe.adaptive_auxiliary_losses import NullBalance
from moesaic.moe.auxiliary_losses import SwitchBalance
from moesaic.moe.expert_selection import NullTopK
from moesaic.moe.router_context import RoutingStats

T, TRUE, NULL = 40, 4, 3
E = TRUE + NULL
SELECT = NullTopK(k=3)


def _state(step):
    return {"step": torch.tensor(float(step))}


@pytest.mark.parametrize("parts", [1, 3])
def test_shares_add_up_to_the_formula(parts):
    logits = torch.randn(T, E)
    given = {"select": SELECT, "num_null_experts": NULL, "state": _state(0), "parts": parts}
    value, gradient = value_and_gradient(NullBalance(weight=0.02), logits, **given)
    leaf = logits.clone().requires_grad_()
    chosen = torch.zeros(T, E).scatter(-1, logits.topk(3).indices, 1).sum(0) / (3 * T)
    chosen[TRUE:] = chosen[TRUE:].mean()
    want = 0.02 * E * (chosen * leaf.softmax(-1).mean(0)).sum()
    torch.testing.assert_close(value, want.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(want, leaf)[0])


def test_the_load_among_null_experts_does_not_matter():
    torch.manual_seed(0)
    logits = torch.randn(T, E)
    moved = logits.clone()
    moved[:, TRUE:] = logits[:, TRUE:].sort(-1).values  # the last null is everyone's favourite
    given = {"select": SELECT, "num_null_experts": NULL, "state": _state(0)}
    values = [value_and_gradient(NullBalance(), x, **given)[0] for x in (logits, moved)]
    torch.testing.assert_close(*values)
    plain = [value_and_gradient(SwitchBalance(), x, **given)[0] for x in (logits, moved)]
    assert abs(float(plain[0] - plain[1])) > 1e-4


@pytest.mark.parametrize(
    ("step", "weight"), [(0, 0.02), (50, 0.01005), (100, 0.0001), (900, 0.0001)]
)
def test_the_weight_is_annealed_between_its_ends(step, weight):
    term = NullBalance(weight=0.02, final_weight=0.0001, decay_steps=100)
    logits = torch.randn(T, E)
    given = {"select": SELECT, "num_null_experts": NULL}
    now, _ = value_and_gradient(term, logits, state=_state(step), **given)
    start, _ = value_and_gradient(term, logits, state=_state(0), **given)
    torch.testing.assert_close(now / start, torch.tensor(weight / 0.02))


def test_it_counts_optimizer_steps():
    state = NullBalance().initial_state(E)
    for _ in range(3):
        state = NullBalance().update_state(
            state, RoutingStats.from_vector(torch.zeros(4 * E + 1).double())
        )
    assert state["step"] == 3
