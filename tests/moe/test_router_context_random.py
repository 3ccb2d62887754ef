"""Random numbers of a token depend on its row key and position only."""

from dataclasses import replace

import torch

from moesaic.moe.router_context import TokenContext


def _context(keys, positions):
    keys, positions = torch.tensor(keys), torch.tensor(positions)
    return replace(TokenContext.unbatched(len(keys)), row_key=keys, position=positions)


def test_random_numbers_of_a_token_are_independent_of_the_batch():
    whole = _context([5, 5, 9], [0, 1, 0]).uniform("x", width=4)
    part = _context([9], [0]).uniform("x", width=4)
    assert torch.equal(whole[2:], part)


def test_layers_and_purposes_have_different_random_numbers():
    context = _context([5, 5], [0, 1])
    draws = [
        context.for_layer(layer).uniform(purpose, width=1)
        for layer in ("encoder.1", "decoder.1")
        for purpose in ("jitter", "room")
    ]
    assert len({float(draw[0, 0]) for draw in draws}) == 4


def test_normal_numbers_have_mean_zero_and_deviation_one():
    drawn = TokenContext.unbatched(20_000).normal("x", width=2)
    assert drawn.mean().abs() < 0.02
    assert (drawn.std() - 1).abs() < 0.02
