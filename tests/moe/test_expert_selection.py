"""Selection rules equal their papers' formulas and sample in training only."""

from dataclasses import replace

import pytest
import torch

from moesaic.moe.batch_group import SingleRankBatch
from moesaic.moe.expert_capacity import Capacity, WeightPriority
from moesaic.moe.expert_selection import SigmoidTopK, SwitchTop1, Top2, TopK
from moesaic.moe.router_context import RouterContext

T, E = 50, 6


def _logits():
    return torch.randn(T, E, requires_grad=True)


def test_switch_weights_the_top_expert_by_its_probability():
    logits = _logits()
    routing = SwitchTop1()(RouterContext.from_logits(logits, training=True))
    probability = logits.softmax(-1)
    assert torch.equal(routing.expert, probability.argmax(-1))
    torch.testing.assert_close(routing.weight, probability.max(-1).values)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_topk_before_sums_to_one_over_the_chosen(k):
    logits = _logits()
    routing = TopK(k=k, normalise="before")(RouterContext.from_logits(logits, training=True))
    top, expert = logits.softmax(-1).topk(k)
    assert torch.equal(routing.expert.view(T, k), expert)
    torch.testing.assert_close(routing.weight.view(T, k), top / top.sum(-1, keepdim=True))


def test_topk_none_keeps_plain_probabilities():
    logits = _logits()
    routing = TopK(k=3, normalise="none")(RouterContext.from_logits(logits, training=True))
    torch.testing.assert_close(routing.weight.view(T, 3), logits.softmax(-1).topk(3).values)


@pytest.mark.parametrize("normalise", ["before", "after", "none"])
def test_a_scale_multiplies_all_weights(normalise):
    gate = RouterContext.from_logits(_logits())
    one, three = (TopK(k=2, normalise=normalise, scale=scale) for scale in (1.0, 3.0))
    plain, scaled = (select.renormalise(select(gate)) for select in (one, three))
    torch.testing.assert_close(scaled.weight, 3 * plain.weight)


def test_the_expert_bias_may_be_added_to_probabilities():
    bias = torch.linspace(-0.4, 0.4, E)
    gate = replace(RouterContext.from_logits(_logits()), bias=bias)
    routing = TopK(k=2, scores="probabilities", normalise="none")(gate)
    probability = gate.logits.softmax(-1)
    assert torch.equal(routing.expert.view(T, 2), (probability + bias).topk(2).indices)
    torch.testing.assert_close(
        routing.weight.view(T, 2), probability.gather(-1, routing.expert.view(T, 2))
    )
    assert not torch.equal(routing.expert, TopK(k=2)(gate).expert)


def test_sigmoid_weights_may_stay_as_they_are():
    logits = _logits()
    routing = SigmoidTopK(k=2, normalise="none")(RouterContext.from_logits(logits))
    torch.testing.assert_close(routing.weight.view(T, 2), logits.sigmoid().topk(2).values)


def test_topk_after_normalises_over_the_kept_edges():
    select = TopK(k=2, normalise="after")
    limit = Capacity(factor=0.5, minimum=0, priority=WeightPriority())
    gate = RouterContext.from_logits(_logits(), training=True)
    routing = select.renormalise(limit(select(gate), gate, SingleRankBatch()))
    weight, alive = routing.weight.view(T, 2), ~routing.dropped.view(T, 2)
    assert alive.sum() < 2 * T
    torch.testing.assert_close(weight.sum(-1), alive.any(-1).float())
    assert torch.equal(weight > 0, alive)


def test_top2_normalises_over_its_two_experts():
    logits = _logits()
    routing = Top2()(RouterContext.from_logits(logits, training=True))
    top, expert = logits.softmax(-1).topk(2)
    assert torch.equal(routing.expert.view(T, 2), expert)
    torch.testing.assert_close(routing.weight.view(T, 2), top / top.sum(-1, keepdim=True))


def test_a_sampled_second_choice_follows_the_softmax_of_the_others():
    logits = torch.tensor([[3.0, 1.0, 0.0, -1.0]]).expand(20000, -1)
    routing = Top2(second="sampled")(RouterContext.from_logits(logits, training=True))
    chosen = routing.expert.view(-1, 2)
    assert (chosen[:, 0] == 0).all()
    share = torch.bincount(chosen[:, 1], minlength=4) / 20000
    want = torch.cat([torch.zeros(1), logits[0, 1:].softmax(-1)])
    torch.testing.assert_close(share, want, rtol=0.1, atol=0.01)


def test_nothing_is_sampled_in_evaluation():
    logits = _logits()
    select = Top2(second="sampled")
    first, again = (select(RouterContext.from_logits(logits, training=False)) for _ in range(2))
    assert torch.equal(first.expert, again.expert)
    assert torch.equal(
        first.expert, Top2()(RouterContext.from_logits(logits, training=False)).expert
    )


@pytest.mark.parametrize("select", [SwitchTop1(), TopK(k=2), TopK(k=2, normalise="none"), Top2()])
def test_the_router_gets_a_gradient(select):
    logits = _logits()
    weigh = torch.randn(T * round(select.experts_per_token(E)))
    (select(RouterContext.from_logits(logits, training=True)).weight * weigh).sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0
