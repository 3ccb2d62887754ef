"""Biased scores are detached; routing statistics are unpacked from a vector."""

from dataclasses import replace

import torch

from moesaic.moe.router_context import RouterContext, RoutingStats, StatefulRule


def test_biased_scores_are_detached():
    logits = torch.zeros(3, 2, requires_grad=True)
    gate = RouterContext.from_logits(logits)
    assert torch.equal(gate.biased_scores(logits), logits.detach())
    biased = replace(gate, bias=torch.tensor([0.0, 1.0])).biased_scores(logits)
    assert biased.argmax(-1).tolist() == [1, 1, 1]
    assert not biased.requires_grad


def test_statistics_are_unpacked_from_the_vector():
    seen = RoutingStats.from_vector(torch.arange(9.0).double())
    assert seen.load.tolist() == [0, 1]
    assert seen.kept_load.tolist() == [2, 3]
    assert seen.logit_sum.tolist() == [4, 5]
    assert seen.logit_square_sum.tolist() == [6, 7]
    assert seen.num_tokens == 8


def test_a_rule_without_a_state_is_unchanged():
    assert StatefulRule().initial_state(4) == {}
    state = {"bias": torch.ones(2)}
    assert (
        StatefulRule().update_state(state, RoutingStats.from_vector(torch.zeros(9).double()))
        is state
    )
