"""Limits keep to their capacity and drop whom they say."""

from dataclasses import replace

import pytest
import torch

from moesaic.moe.batch_group import SingleRankBatch
from moesaic.moe.edge_queues import queue_positions
from moesaic.moe.expert_capacity import (
    BatchPriority,
    Capacity,
    Dropless,
    PositionPriority,
    RandomPriority,
    WeightPriority,
)
from moesaic.moe.expert_selection import SwitchTop1, TopK
from moesaic.moe.router_context import RouterContext, TokenContext
from moesaic.moe.routing import Routing

T, E = 60, 4


def _routing(select=None):
    logits = torch.randn(T, E) + torch.tensor([2.0, 0, 0, 0])  # expert 0 is crowded
    return (select or SwitchTop1())(RouterContext.from_logits(logits, training=True))


def _limited(limit, routing, *, training, key=0):
    """The routing under a limit; ``key`` is that of the one batch row all tokens are in."""
    context = replace(
        TokenContext.unbatched(routing.num_tokens), row_key=torch.full((routing.num_tokens,), key)
    )
    gate = RouterContext(torch.zeros(routing.num_tokens, E), context, training)
    return limit(routing, gate, SingleRankBatch())


def _to_one_expert(tokens, weight=None):
    weight = torch.rand(tokens, 1) if weight is None else weight[:, None]
    expert = torch.zeros(tokens, 1, dtype=torch.long)
    return Routing.from_topk(weight, expert=expert, num_experts=E)


PRIORITIES = [PositionPriority(), WeightPriority(), BatchPriority(), RandomPriority()]


@pytest.mark.parametrize("priority", PRIORITIES, ids=repr)
@pytest.mark.parametrize("select", [SwitchTop1(), TopK(k=2)], ids=repr)
def test_no_expert_exceeds_its_capacity_or_leaves_it_unused(priority, select):
    before = _routing(select)
    limit = Capacity(factor=1.0, minimum=0, priority=priority)
    after = _limited(limit, before, training=True)
    room = int(
        limit.expert_capacity(torch.tensor(before.expert.numel()), num_experts=E, factor=1.0)
    )
    assert after.load().tolist() == before.load().clamp(max=room).tolist()
    assert after.dropped.any()


def test_capacity_is_the_ceiling_of_the_fair_share_and_at_least_the_minimum():
    ten = torch.tensor(10)
    assert Capacity(minimum=0).expert_capacity(ten, num_experts=4, factor=1.0) == 3  # ceil(10 / 4)
    assert Capacity(minimum=4).expert_capacity(ten, num_experts=4, factor=1.0) == 4


def test_by_position_keeps_the_first_tokens():
    after = _limited(
        Capacity(factor=1.0, minimum=0, priority=PositionPriority()),
        _to_one_expert(12),
        training=True,
    )
    assert after.dropped.tolist() == 3 * [False] + 9 * [True]


def test_by_position_serves_all_first_choices_before_any_second():
    expert = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 1]])
    routing = Routing.from_topk(torch.ones(4, 2), expert=expert, num_experts=2)
    after = _limited(
        Capacity(factor=0.5, minimum=0, priority=PositionPriority()), routing, training=True
    )
    assert after.dropped.view(4, 2).tolist() == [[False, True]] * 4


def test_by_weight_keeps_the_largest_weights():
    weight = torch.rand(12)
    limit = Capacity(factor=1.0, minimum=0, priority=WeightPriority())
    after = _limited(limit, _to_one_expert(12, weight), training=True)
    assert set((~after.dropped).nonzero()[:, 0].tolist()) == set(weight.topk(3).indices.tolist())


def batch_priority_by_definition(logits, *, k, capacity):
    """Algorithm 2 of 2106.05974: all first choices, then second ones, by a token's greatest weight.

    Returns which of the edges [T, K] are kept.
    """
    probability = logits.softmax(-1)
    greatest, choices = probability.max(-1).values, probability.topk(k, dim=-1).indices
    room, kept = [capacity] * logits.shape[1], torch.zeros(len(logits), k, dtype=torch.bool)
    for choice in range(k):
        for token in greatest.argsort(descending=True, stable=True).tolist():
            expert = int(choices[token, choice])
            kept[token, choice] = room[expert] > 0
            room[expert] -= bool(room[expert] > 0)
    return kept


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 2, 3])
def test_batch_priority_equals_its_definition_with_gradients(k, seed):
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    limit = Capacity(factor=0.6, minimum=0, priority=BatchPriority())
    gate = RouterContext.from_logits(logits, training=True)
    routing = TopK(k=k, normalise="none")(gate)
    limited = limit(routing, gate, SingleRankBatch())
    capacity = int(limit.expert_capacity(torch.tensor(T * k), num_experts=E, factor=0.6))
    kept = batch_priority_by_definition(logits, k=k, capacity=capacity)
    assert torch.equal(~limited.dropped.view(T, k), kept)
    value = torch.randn(T, k, generator=torch.Generator().manual_seed(9))
    (found,) = torch.autograd.grad((limited.weight.view(T, k) * value).sum(), logits)
    weight = logits.softmax(-1).topk(k, dim=-1).values
    (expected,) = torch.autograd.grad((weight * value * kept).sum(), logits)
    torch.testing.assert_close(found, expected)


def test_batch_priority_is_not_the_order_of_weights():
    logits = torch.randn(400, E, generator=torch.Generator().manual_seed(0))
    gate = RouterContext.from_logits(logits, training=True)
    by_token, by_weight = (
        Capacity(factor=0.6, minimum=0, priority=p)(TopK(k=2)(gate), gate, SingleRankBatch())
        for p in (BatchPriority(), WeightPriority())
    )
    assert 0 < int((by_token.dropped != by_weight.dropped).sum()) < 800


def test_at_random_survival_does_not_depend_on_position():
    limit = Capacity(factor=1.0, minimum=0, priority=RandomPriority())
    survived = torch.zeros(20)
    for draw in range(2000):
        survived += ~_limited(limit, _to_one_expert(20), training=True, key=draw).dropped
    torch.testing.assert_close(survived / 2000, torch.full((20,), 0.25), rtol=0, atol=0.05)


def test_at_random_is_by_weight_in_evaluation():
    routing = _routing()
    random, heavy = (
        _limited(
            Capacity(factor=1.0, eval_factor=1.0, minimum=0, priority=p), routing, training=False
        )
        for p in (RandomPriority(), WeightPriority())
    )
    assert random.dropped.any()
    assert torch.equal(random.expert, heavy.expert)


def test_evaluation_is_dropless_unless_it_has_its_own_factor():
    routing = _routing()
    assert not _limited(Capacity(factor=0.5, minimum=0), routing, training=False).dropped.any()
    strict = Capacity(factor=5.0, eval_factor=0.5, minimum=0)
    assert _limited(strict, routing, training=False).dropped.any()


def test_dropless_changes_nothing():
    routing = _routing()
    assert _limited(Dropless(), routing, training=True) is routing


def test_queue_positions_count_per_expert():
    edges = torch.tensor([[1, 5], [0, 2], [1, 9], [1, 1], [0, 3]])
    assert queue_positions(edges).tolist() == [1, 0, 2, 0, 1]


def test_queue_positions_compare_later_columns_on_ties():
    edges = torch.tensor([[0, 1, -3], [0, 1, -7], [0, 0, 4]])
    assert queue_positions(edges).tolist() == [2, 1, 0]


def test_null_experts_have_no_capacity_limit():
    expert = torch.tensor([[3], [3], [3], [3], [0], [0], [0], [0]])  # the last one costs nothing
    routing = Routing.from_topk(torch.ones(8, 1), expert=expert, num_experts=E)
    gate = RouterContext(
        torch.zeros(8, E), TokenContext.unbatched(8), training=True, num_null_experts=1
    )
    after = Capacity(factor=1.0, minimum=0)(routing, gate, SingleRankBatch())
    assert after.load().tolist() == [2, 0, 0, 4]
