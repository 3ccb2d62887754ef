"""Law: a sequence mixer that decodes in steps equals one pass over whole rows."""

import pytest
import torch

from mixer_cases import MIXERS
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.decode_slots import DecodeSlots
from moesaic.nn.packing import Packing
from moesaic.nn.positional_encoding import Rotary
from moesaic.nn.sequence_mixer import MixerContext, MixerShape, ParallelMixers

SHAPE = MixerShape(
    16, causal=True, attention=AttentionConfig(heads=4, kv_heads=2), bias=True, position=Rotary()
)
MEMBERS = MIXERS | {"all_in_parallel": ParallelMixers(mixers=tuple(MIXERS.values()))}
LENGTHS = torch.tensor([7, 4, 6])
STEPS = ((3, 1, 2), (1, 1, 0), (1, 0, 2), (1, 2, 1), (1, 0, 1))  # newest tokens of each row
# after a step: (which rows continue, of which sources); each row is then one of two of its source
KEPT = {1: ([0, 0, 1, 1, 2, 2], None), 3: ([4, 5, 1, 1], [2, 0])}


def _module(name):
    torch.manual_seed(0)
    module = MEMBERS[name].build(SHAPE)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module


@pytest.mark.parametrize("name", MEMBERS)
@torch.no_grad()
def test_a_mixer_in_steps_equals_one_pass(name):
    module, packing = _module(name), Packing.from_lengths(LENGTHS, length=int(LENGTHS.max()))
    x = torch.randn(packing.num_tokens, SHAPE.dim)
    whole = module(x, context=MixerContext.of_rows(packing, causal=True))
    given, wanted = (packing.pad(y) for y in (x, whole))
    row, start = torch.arange(3), torch.zeros(3, dtype=torch.long)  # of each row that is decoded
    state, slots = module.init_state(3, like=x), DecodeSlots.empty(3, device=x.device)
    for step, newest in enumerate(STEPS):
        count = torch.tensor(newest)[row]
        now = Packing.from_lengths(count, length=int(count.max()))
        place = start[now.row] + now.position
        slots.append(start, now)
        context = MixerContext(now, place, causal=True, slots=slots)
        out = module(given[row[now.row], place], context=context, state=state)
        torch.testing.assert_close(out, wanted[row[now.row], place], rtol=1e-4, atol=1e-5)
        start = start + count
        if step in KEPT:
            rows, sources = (None if k is None else torch.tensor(k) for k in KEPT[step])
            state = state.select(rows, sources)
            slots.select(rows, sources)
            row, start = row[rows], start[rows]
    assert torch.equal(start, LENGTHS[row])


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
