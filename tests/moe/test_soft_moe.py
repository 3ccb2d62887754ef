"""Soft MoE equals its definition row by row."""

from dataclasses import replace

import pytest
import torch

from model.samples import BASE
from moesaic.core.errors import ConfigError
from moesaic.moe.router_context import RouterState, TokenContext
from moesaic.moe.soft_moe import SoftMoE
from moesaic.nn.feed_forward import FeedForwardConfig, SwiGLU
from moesaic.nn.parameter_spec import FeedForwardShape

DIM, EXPERTS, SLOTS = 6, 3, 2
LENGTHS = [4, 1, 7]
ROW = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))
PLACE = torch.cat([torch.arange(n) for n in LENGTHS])


def _layer():
    feed = FeedForwardConfig(hidden=10, activation=SwiGLU())
    made = SoftMoE(experts=EXPERTS, slots=SLOTS).build(FeedForwardShape(DIM, feed, bias=False))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    torch.nn.init.constant_(made.scale, 3.0)
    return made


def _run(layer, x, *, row=ROW, place=PLACE):
    context = replace(TokenContext.unbatched(len(x)), row=row, position=place)
    return layer(x, context=context, router_state=RouterState()).out


def _definition(layer, x):
    outs, unit = [], torch.nn.functional.normalize
    for tokens in x.split(LENGTHS):
        logits = unit(tokens, dim=1) @ (layer.scale * unit(layer.directions, dim=1)).T
        dispatch, combine = logits.softmax(0), logits.softmax(1)
        answers = []
        for slot in range(EXPERTS * SLOTS):
            expert, read = slot // SLOTS, dispatch[:, slot] @ tokens
            hidden = layer.experts.activation(read @ layer.experts.up[expert])
            answers.append(hidden @ layer.experts.down[expert])
        outs.append(combine @ torch.stack(answers))
    return torch.cat(outs)


def test_a_soft_mixture_equals_its_definition_with_gradients():
    layer, x = _layer(), torch.randn(12, DIM, requires_grad=True)
    weigh, leaves = torch.randn(12, DIM), [x, *layer.parameters()]
    for got, want in zip(
        *(
            [out, *torch.autograd.grad((out * weigh).sum(), leaves)]
            for out in (_run(layer, x), _definition(layer, x))
        ),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_rows_are_independent():
    layer, x = _layer(), torch.randn(12, DIM)
    alone = _run(layer, x[5:], row=torch.full((7,), 9), place=PLACE[5:])
    torch.testing.assert_close(_run(layer, x)[5:], alone)
    assert _run(layer, x[:0], row=ROW[:0], place=PLACE[:0]).shape == (0, DIM)


def test_every_token_depends_on_later_ones():
    layer, x = _layer(), torch.randn(12, DIM)
    changed = x.clone()
    changed[-1] += 1
    moved = (_run(layer, changed) - _run(layer, x)).abs().amax(1) > 1e-6
    assert moved.tolist() == [False] * 5 + [True] * 7


def test_a_decoder_refuses_it():
    with pytest.raises(ConfigError, match=r"SoftMoE .*encoder\.moe"):
        BASE.replace(moe=SoftMoE(experts=2))
