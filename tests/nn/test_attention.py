"""Attention equals its definition with masks, and decoding with a cache equals one pass."""

import math

import pytest
import torch

from moesaic.nn.attention import Attention
from moesaic.nn.attention_backend import KeyValue, attend
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.attention_parts import LogPositionTemperature
from moesaic.nn.attention_scores import AttentionMask, AttentionScores
from moesaic.nn.cross_attention import CrossAttention
from moesaic.nn.decode_slots import DecodeSlots
from moesaic.nn.packing import Packing
from moesaic.nn.positional_encoding import Rotary
from moesaic.nn.sequence_mixer import MixerContext, MixerShape
from ops.references import reference_attend

DIM = 16
REAL = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)


def _layer(*, causal, bias=False, **heads):
    shape = MixerShape(
        DIM, causal=causal, attention=AttentionConfig(**heads), bias=bias, position=Rotary()
    )
    return Attention().build(shape)


def _rows(packing, *, causal):
    return MixerContext.of_rows(packing, causal=causal)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("masking", ["all", "causal", "masked"])
def test_attention_equals_its_definition_with_gradients(groups, masking):
    query = torch.randn(2, 4, 5, 4, requires_grad=True)
    keys = KeyValue(*(torch.randn(2, groups, 5, 4, requires_grad=True) for _ in range(2)))
    mask = REAL[:, None, None] if masking == "masked" else None
    results = []
    scores = AttentionScores(AttentionMask(causal=masking == "causal"))
    for out in (
        attend(query, keys, mask=mask, scores=scores),
        reference_attend(query, keys, mask=mask, causal=masking == "causal"),
    ):
        results.append([out, *torch.autograd.grad(out.square().sum(), (query, keys.key))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_temperature_by_position_is_the_scale_of_each_query():
    packing, x = Packing.from_lengths(torch.tensor([5]), length=5), torch.randn(5, DIM)
    context, heads = _rows(packing, causal=True), {"heads": 4, "kv_heads": 2}
    tempered = _layer(causal=True, **heads, temperature=LogPositionTemperature(interval=2))
    out = tempered(x, context=context)
    for position, steps in enumerate([0, 1, 1, 2, 2]):  # floor((position + 1) / 2)
        factor = 1 + 0.1 * math.log(1 + steps)
        plain = _layer(causal=True, **heads, scale=factor * 4**-0.5)
        plain.load_state_dict(tempered.state_dict())
        want = plain(x, context=context)[position]
        torch.testing.assert_close(out[position], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_no_real_token(causal):
    layer = _layer(heads=4, kv_heads=2, causal=causal, bias=True)
    packing = Packing.from_mask(REAL)
    x = torch.randn(packing.num_tokens, DIM)
    both = layer(x, context=_rows(packing, causal=causal))
    for row in range(2):
        mine = packing.row == row
        alone = Packing.from_mask(torch.ones(1, int(mine.sum()), dtype=torch.bool))
        one = layer(x[mine], context=_rows(alone, causal=causal))
        torch.testing.assert_close(both[mine], one, rtol=1e-4, atol=1e-5)


def test_causal_attention_ignores_later_tokens():
    layer = _layer(heads=4, causal=True)
    packing = Packing.from_mask(torch.ones(1, 5, dtype=torch.bool))
    x = torch.randn(5, DIM)
    before = layer(x, context=_rows(packing, causal=True))
    x[3:] += 1.0
    after = layer(x, context=_rows(packing, causal=True))
    assert torch.equal(before[:3], after[:3])
    assert not torch.allclose(before[3], after[3])


def test_steps_through_a_cache_equal_one_causal_pass():
    layer = _layer(heads=4, kv_heads=2, causal=True)
    packing = Packing.from_mask(torch.ones(2, 5, dtype=torch.bool))
    x = torch.randn(2, 5, DIM)
    whole = layer(x.flatten(0, 1), context=_rows(packing, causal=True)).view(2, 5, DIM)
    state = layer.init_state(2, like=x)
    slots, done = DecodeSlots.empty(2, device=x.device), 0
    for count in (2, 1, 2):  # a prompt, then tokens
        now = Packing.from_mask(torch.ones(2, count, dtype=torch.bool))
        slots.append(torch.full((2,), done), now)
        context = MixerContext(now, done + now.position, causal=True, slots=slots)
        part = layer(x[:, done : done + count].flatten(0, 1), context=context, state=state)
        want = whole[:, done : done + count].flatten(0, 1)
        torch.testing.assert_close(part, want, rtol=1e-4, atol=1e-5)
        done += count


def test_cross_attention_reads_the_source_of_its_row():
    layer = CrossAttention(AttentionConfig(heads=4), dim=DIM, bias=False)
    source, target = Packing.from_mask(REAL), Packing.from_mask(torch.ones(2, 2, dtype=torch.bool))
    memory = torch.randn(source.num_tokens, DIM)
    x = torch.randn(4, DIM)
    read = layer.project_source(memory, packing=source)
    out = layer(x, packing=target, source=read, mask=source.key_mask)
    alone = Packing.from_mask(torch.ones(1, 3, dtype=torch.bool))
    read = layer.project_source(memory[source.row == 1], packing=alone)
    one = layer(
        x[2:], packing=Packing.from_mask(torch.ones(1, 2, dtype=torch.bool)), source=read, mask=None
    )
    torch.testing.assert_close(out[2:], one, rtol=1e-4, atol=1e-5)
