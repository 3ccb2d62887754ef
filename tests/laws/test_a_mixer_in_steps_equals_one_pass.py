"""Law: a sequence mixer that decodes in steps equals one pass over whole rows."""

import pytest
import torch

from mixer_cases import MIXERS
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.packing import Packing
from moesaic.nn.positional_encoding import Rotary
from moesaic.nn.sequence_mixer import MixerContext, MixerShape, Parallel

SHAPE = MixerShape(
    16, causal=True, attention=AttentionConfig(heads=4, kv_heads=2), bias=True, position=Rotary()
)
MEMBERS = MIXERS | {"all_in_parallel": Parallel(mixers=tuple(MIXERS.values()))}
LENGTHS = torch.tensor([7, 4, 6])
STEPS = torch.tensor([[3, 1, 2], [1, 1, 0], [1, 0, 2], [1, 1, 1], [1, 1, 1]])  # newest of each row


def _module(name):
    torch.manual_seed(0)
    module = MEMBERS[name].build(SHAPE)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module


def _rows_of(packing, y, row):
    return y[packing.row == row]


@pytest.mark.parametrize("name", MEMBERS)
@torch.no_grad()
def test_a_mixer_in_steps_equals_one_pass(name):
    module, width = _module(name), int(LENGTHS.max())
    packing = Packing.from_lengths(LENGTHS, length=width)
    x = torch.randn(packing.num_tokens, SHAPE.dim)
    whole = module(x, context=MixerContext.of_rows(packing, causal=True))
    state, start = module.init_state(3, like=x), torch.zeros(3, dtype=torch.long)
    found = [[] for _ in LENGTHS]
    for step, newest in enumerate(STEPS):
        now = Packing.from_lengths(newest, length=int(newest.max()))
        place = start[now.row] + now.position
        given = torch.cat(
            [_rows_of(packing, x, r)[start[r] : start[r] + newest[r]] for r in range(3)]
        )
        state.reserve(int((start + now.length).max()))
        context = MixerContext(now, place, causal=True, start=start)
        out = module(given, context=context, state=state)
        for row in range(3):
            found[row].append(_rows_of(now, out, row))
        start = start + newest
        if step == 2:  # a search continues some rows twice, in another order
            state = state.select(torch.tensor([0, 1, 2, 1])).select(torch.tensor([0, 3, 2]))
    assert torch.equal(start, LENGTHS)
    for row, parts in enumerate(found):
        want = _rows_of(packing, whole, row)
        torch.testing.assert_close(torch.cat(parts), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MEMBERS)
@torch.no_grad()
def test_a_causal_mixer_reads_no_later_token(name):
    module, packing = _module(name), Packing.from_lengths(torch.tensor([6]), length=6)
    x, context = torch.randn(6, SHAPE.dim), MixerContext.of_rows(packing, causal=True)
    before = module(x, context=context)
    after = module(torch.cat([x[:4], x[4:] + 1.0]), context=context)
    torch.testing.assert_close(before[:4], after[:4])
    assert not torch.allclose(before[4:], after[4:])


@pytest.mark.parametrize("name", MEMBERS)
def test_the_declared_parameters_are_those_of_the_module(name):
    declared = sorted(spec.shape for spec in MEMBERS[name].parameter_specs(SHAPE))
    assert sorted(tuple(p.shape) for p in _module(name).parameters()) == declared
