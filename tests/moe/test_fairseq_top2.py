"""``Top2`` with a capacity equals fairseq's gate, with which NLLB-MoE was trained."""

import math

import pytest
import torch
import torch.nn.functional as F

from moesaic.moe.batch_group import SingleRankBatch
from moesaic.moe.config import MoE
from moesaic.moe.expert_capacity import (
    BatchPriority,
    Capacity,
    PositionPriority,
    RowCapacity,
)
from moesaic.moe.expert_selection import SwitchTop1, Top2, TopK
from moesaic.moe.router_context import RouterContext, TokenContext

T, E = 48, 4


def fairseq_weights(logits, *, normalise, by_token, draw):
    """Combine weights [T, E] of ``top2gating``: masks by cumulative sums, capacity 2 ceil(T / E).

    ``draw`` [T] are uniform numbers of the policy ``random``, None: the policy ``all``.
    """
    gates, capacity = logits.softmax(-1), 2 * math.ceil(T / E)
    mask1 = F.one_hot(gates.argmax(-1), E)
    mask2 = F.one_hot(gates.masked_fill(mask1.bool(), float("-inf")).argmax(-1), E)
    gate1, gate2 = (gates * mask1).sum(1), (gates * mask2).sum(1)
    tiny = torch.finfo(gates.dtype).eps
    if normalise == "before":
        total = (gate1 + gate2).clamp(min=tiny)
        gate1, gate2 = gate1 / total, gate2 / total
    if draw is not None:
        mask2 = mask2 * (2 * gate2 > draw).long()[:, None]
    order = (-gates.max(-1).values).argsort(stable=True) if by_token else torch.arange(T)
    back = order.argsort()
    place1 = (mask1[order].cumsum(0) - 1)[back]
    place2 = (mask2[order].cumsum(0) - 1)[back] + mask1.sum(0)
    mask1, mask2 = mask1 * (place1 < capacity), mask2 * (place2 < capacity)
    gate1, gate2 = gate1 * mask1.sum(1), gate2 * mask2.sum(1)
    if normalise == "after":
        total = (gate1 + gate2).clamp(min=tiny)
        gate1, gate2 = gate1 / total, gate2 / total
    return gate1[:, None] * mask1 + gate2[:, None] * mask2


def weights_of(routing):
    table = torch.zeros(T, E + 1)
    table = table.index_put((routing.token, routing.expert), routing.weight, accumulate=True)
    return table[:, :E]


@pytest.mark.parametrize("second", ["highest", "random"])
@pytest.mark.parametrize("priority", [PositionPriority(), BatchPriority()], ids=repr)
@pytest.mark.parametrize("normalise", ["before", "after"])
def test_top2_with_a_capacity_equals_the_gate_of_fairseq_with_gradients(
    normalise, priority, second
):
    logits = 2 * torch.randn(T, E)
    logits[:, 0] += 1.5
    logits.requires_grad_()
    router = RouterContext.from_logits(logits, training=True)
    select = Top2(normalise=normalise, second=second, scale=0.8)
    limit = Capacity(factor=1.0, minimum=0, priority=priority)
    limited = select.renormalise(limit(select(router), router, SingleRankBatch()))
    found = weights_of(limited)
    draw = router.context.uniform("second choice", width=1)[:, 0] if second == "random" else None
    by_token = isinstance(priority, BatchPriority)
    wanted = 0.8 * fairseq_weights(logits, normalise=normalise, by_token=by_token, draw=draw)
    assert limited.dropped.any()
    torch.testing.assert_close(found, wanted)
    direction = torch.randn(T, E)
    mine, theirs = (
        torch.autograd.grad((table * direction).sum(), logits)[0] for table in (found, wanted)
    )
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def test_a_random_second_expert_is_kept_with_twice_its_weight():
    logits = torch.tensor([[2.0, 0.5, -1.0]]).expand(20_000, -1)
    routing = Top2(second="random")(RouterContext.from_logits(logits, training=True))
    share = 2 * logits[0, :2].softmax(-1)[1]
    torch.testing.assert_close(1 - routing.dropped.float().mean() * 2, share, atol=0.01, rtol=0)
    assert not Top2(second="random")(RouterContext.from_logits(logits)).dropped.any()


@pytest.mark.parametrize("training", [True, False])
def test_a_capacity_of_rows_keeps_the_first_tokens_of_each_row(training):
    rows = torch.tensor([0] * 7 + [1] * 3)
    logits = torch.randn(10, 2)
    position = torch.cat([torch.arange(7), torch.arange(3)])
    none = torch.zeros(10, dtype=torch.long)
    router = RouterContext(logits, TokenContext(rows, position, none, none, none), training)
    routing = SwitchTop1()(router)
    kept = ~RowCapacity(number=2)(routing, router, SingleRankBatch()).dropped
    for row, expert in ((0, 0), (0, 1), (1, 0), (1, 1)):
        inside = (rows == row) & (routing.expert == expert)
        assert kept[inside].tolist() == [i < 2 for i in range(int(inside.sum()))]
    assert MoE(experts=2, limit=RowCapacity()).needs_whole_rows


def test_a_scale_multiplies_all_weights():
    router = RouterContext.from_logits(torch.randn(T, E))
    for normalise in ("before", "after", "none"):
        plain, scaled = (
            rule.renormalise(rule(router))
            for rule in (TopK(normalise=normalise), TopK(normalise=normalise, scale=2.5))
        )
        torch.testing.assert_close(scaled.weight, 2.5 * plain.weight)
