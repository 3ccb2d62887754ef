"""Routing analysis finds the dependence on tokens and positions in synthetic routes."""

import pytest
import torch

from moesaic.evaluate.routing_analysis import MAX_POSITIONS, RoutingAnalysis, simulate_drops
from moesaic.moe.routing import Routing
from moesaic.moe.routing_record import LayerRoutes, RoutedTokens

EXPERTS, ROWS, LENGTH = 4, 60, 20


def routes(rule, *, num_null_experts=0, k=1, seed=0):
    """Tokens of random ids, routed by ``rule(ids, positions)`` [N] or [N, k]."""
    make = torch.Generator().manual_seed(seed)
    count = ROWS * LENGTH
    ids = torch.randint(100, 140, (count,), generator=make)
    position, row = torch.arange(count) % LENGTH, torch.arange(count) // LENGTH
    expert = rule(ids, position).view(count, k)
    weight = torch.ones(count, k)
    routing = Routing.from_topk(weight, expert=expert, num_experts=EXPERTS)
    tokens = RoutedTokens(ids, position, row, torch.zeros(count, dtype=torch.long))
    return LayerRoutes("encoder.0", routing, tokens, num_null_experts)


def found(*batches):
    insight = RoutingAnalysis(("deu_Latn",))
    for batch in batches:
        insight.add((batch,))
    return insight.to_dict(show=lambda index: f"<{index}>")["layers"]["encoder.0"]


def test_a_router_that_reads_the_token_alone_is_found_out():
    result = found(routes(lambda ids, _: ids % EXPERTS))["uncertainty"]
    assert result["token"] == 0
    assert result["token_by_chance"] > 0.9
    assert result["position"] > 0.9
    assert result["position_by_chance"] > 0.9


def test_a_router_that_reads_the_position_alone_is_found_out():
    result = found(routes(lambda _, position: position % EXPERTS))["uncertainty"]
    assert result["position"] == 0
    assert result["token"] == pytest.approx(result["token_by_chance"], abs=0.02)


def test_typical_tokens_are_shown_as_text():
    typical = found(routes(lambda ids, _: ids % EXPERTS))["typical"]
    assert [len(row) for row in typical] == [8] * EXPERTS
    for expert, row in enumerate(typical):
        assert all(int(text[1:-1]) % EXPERTS == expert for text in row)


def test_batches_add_up_whatever_ids_they_have():
    def rule(ids, _):
        return ids % EXPERTS

    one, other = routes(rule), routes(rule, seed=1)
    both = found(one, other)
    assert sum(both["positions"]["asked"]) == 2 * ROWS * LENGTH
    assert both["uncertainty"]["token"] == 0


def test_drops_are_counted_at_their_positions():
    def rule(ids, position):
        return torch.where(position >= 15, EXPERTS, ids % EXPERTS)

    positions = found(routes(rule))["positions"]
    assert positions["asked"] == [ROWS] * LENGTH
    assert positions["dropped"] == [0] * 15 + [ROWS] * 5


def test_with_first_come_first_served_late_tokens_would_be_dropped_and_at_random_all_alike():
    positions = found(routes(lambda ids, _: ids * 7919 % EXPERTS))["positions"]
    first, random = positions["first_come"], positions["at_random"]
    assert sum(first) == sum(random) > 100  # as many, since a row's queues are as full
    assert sum(first[:5]) == 0
    assert sum(first[15:]) > 0.6 * sum(first)
    assert 0.15 < sum(random[:5]) / sum(random) < 0.35


def test_room_is_a_rows_fair_share_counted_by_hand():
    tokens = RoutedTokens(
        *(torch.tensor(x) for x in ([1] * 5, [0, 1, 2, 3, 0], [0, 0, 0, 0, 1], [0] * 5))
    )
    expert = torch.tensor([[0], [0], [0], [1], [0]])
    routing = Routing.from_topk(torch.ones(5, 1), expert=expert, num_experts=2)
    lost = simulate_drops(LayerRoutes("e.0", routing, tokens), order=tokens.position)
    assert lost.tolist() == [False, False, True, False, False]  # room for 4 / 2 in the first row
    last_first = simulate_drops(LayerRoutes("e.0", routing, tokens), order=-tokens.position)
    assert last_first.tolist() == [True, False, False, False, False]


def test_null_experts_have_no_capacity():
    def all_idle(ids, _):
        return torch.full_like(ids, EXPERTS - 1)

    assert sum(found(routes(all_idle, num_null_experts=1))["positions"]["first_come"]) == 0
    assert sum(found(routes(all_idle))["positions"]["first_come"]) > 0


def test_first_choices_come_before_second_ones():
    def both(ids, position):
        return torch.stack([torch.zeros_like(ids), 1 + position % 3], -1)

    batch = routes(both, k=2)
    k = batch.routing.per_token
    choice = torch.arange(batch.routing.expert.numel()) % k
    positions = found(batch)["positions"]
    lost = simulate_drops(batch, order=choice * LENGTH + batch.tokens.position[batch.routing.token])
    assert sum(positions["first_come"]) == int(lost.sum())
    assert not lost[choice == 1].any()  # spread over three experts, they fit


def test_positions_beyond_the_last_count_as_the_last():
    batch = routes(lambda ids, _: ids % EXPERTS)
    far = RoutedTokens(batch.tokens.token, batch.tokens.position + 10_000, batch.tokens.row,
                 batch.tokens.language)  # fmt: skip
    positions = found(LayerRoutes("encoder.0", batch.routing, far))["positions"]
    assert len(positions["asked"]) == MAX_POSITIONS
    assert positions["asked"][-1] == ROWS * LENGTH


def test_a_batch_without_tokens_counts_nothing():
    none = torch.zeros(0, dtype=torch.long)
    routing = Routing.from_topk(torch.zeros(0, 1), expert=none.view(0, 1), num_experts=EXPERTS)
    result = found(LayerRoutes("encoder.0", routing, RoutedTokens(none, none, none, none)))
    assert result["positions"]["asked"] == []
    assert result["typical"] == [[]] * EXPERTS
