"""Routings: made from top-k and masks, counted, dropped."""

import torch

from moesaic.moe.routing import Routing


def _routing():
    expert = torch.tensor([[2, 0], [2, 1], [0, 2]])
    weight = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.5, 0.5]])
    return Routing.from_topk(weight, expert=expert, num_experts=4)


def test_edges_of_top_k_are_token_major():
    routing = _routing()
    assert routing.token.tolist() == [0, 0, 1, 1, 2, 2]
    assert routing.expert.tolist() == [2, 0, 2, 1, 0, 2]
    assert routing.per_token == 2
    assert routing.num_tokens == 3


def test_load_counts_edges_that_are_not_dropped():
    routing = _routing()
    assert routing.load().tolist() == [2, 1, 3, 0]
    cut = routing.drop(torch.tensor([True, False, False, False, False, False]))
    assert cut.load().tolist() == [2, 1, 2, 0]
    assert cut.dropped.tolist() == [True] + 5 * [False]
    assert cut.weight[0] == 0
    assert torch.equal(cut.weight[1:], routing.weight[1:])
    assert cut.expert.numel() == routing.expert.numel()
