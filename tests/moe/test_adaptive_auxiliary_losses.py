"""The scale of an adaptive balance follows what was dropped, step by step."""

import math

import pytest
import torch

from moe.balance_cases import EXPERTS, TOKENS, balance_inputs
from moesaic.core.errors import ConfigError
from moesaic.moe.adaptive_auxiliary_losses import AdaptiveBalance
from moesaic.moe.auxiliary_losses import SwitchBalance
from moesaic.moe.config import MoE
from moesaic.moe.expert_capacity import Capacity
from moesaic.moe.router_context import RoutingStats


def seen(dropped):
    """The statistics of a step of 100 edges, some of them dropped."""
    sums = torch.zeros(4 * EXPERTS + 1, dtype=torch.float64)
    sums[0], sums[EXPERTS] = 100, 100 - dropped
    return RoutingStats.from_vector(sums)


def learned(term, steps):
    state = term.initial_state(EXPERTS)
    for dropped in steps:
        state = term.update_state(state, seen(dropped))
    return {name: float(value) for name, value in state.items()}


def test_the_scale_rises_above_the_upper_bound_and_falls_below_the_lower():
    term = AdaptiveBalance(max_dropped=0.1, min_dropped=0.01, log_step=0.5)
    assert learned(term, [20])["log_scale"] == 0.5
    assert learned(term, [5])["log_scale"] == 0.0
    assert learned(term, [0])["log_scale"] == -0.5


def test_the_average_is_a_plain_mean_before_the_ema():
    assert learned(AdaptiveBalance(), [30, 10, 20])["average"] == pytest.approx(0.2)
    state = learned(AdaptiveBalance(ema_weight=0.5), [30, 10, 20])
    assert state["average"] == pytest.approx((0.3 * 0.5 + 0.1 * 0.5) * 0.5 + 0.2 * 0.5)


def test_the_loss_is_the_scaled_switch_loss():
    term = AdaptiveBalance(weight=0.1)
    scores = balance_inputs(torch.randn(TOKENS, EXPERTS), term=term)
    scores.router.state["log_scale"].fill_(math.log(3.0))
    torch.testing.assert_close(term(scores), 3 * SwitchBalance(weight=0.1)(scores))


def test_dropless_is_refused():
    with pytest.raises(ConfigError, match="AdaptiveBalance expects a limit that can drop edges"):
        MoE(experts=4, balance=(AdaptiveBalance(),))
    MoE(experts=4, balance=(AdaptiveBalance(),), limit=Capacity())
