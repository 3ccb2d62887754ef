"""Norms of queries and keys are those of each head, or of all heads together."""

import pytest
import torch

from moesaic.nn.attention import Attention
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.norm import LayerNorm
from moesaic.nn.packing import Packing
from moesaic.nn.positional_encoding import Rotary
from moesaic.nn.qk_norm import (
    AcrossHeadsQKNorm,
    HeadNumbers,
    L2QKNorm,
    NoQKNorm,
    PerHeadQKNorm,
    QKNorm,
)
from moesaic.nn.sequence_mixer import MixerContext, MixerShape

NUMBERS = HeadNumbers(heads=4, kv_heads=2, head_dim=6)
EPS = 1e-6


def rms(x, *, over):
    return x / (x.square().mean(over, keepdim=True) + EPS).sqrt()


NORMS = {
    NoQKNorm(): lambda x, _: x,
    PerHeadQKNorm(): lambda x, gain: rms(x, over=-1) * gain,
    AcrossHeadsQKNorm(): lambda x, gain: rms(x, over=(-2, -1)) * gain.view(x.shape[1:]),
    L2QKNorm(): lambda x, _: rms(x, over=-1),
    PerHeadQKNorm(norm=LayerNorm()): lambda x, gain: torch.nn.functional.layer_norm(x, (6,), gain),
}


def test_every_norm_is_tested():
    assert {type(norm) for norm in NORMS} == set(QKNorm.members.values())


@pytest.mark.parametrize("norm", NORMS, ids=repr)
def test_attention_is_that_of_normalised_queries_and_keys(norm):
    position = torch.arange(5)
    shape = MixerShape(
        24, causal=True, attention=AttentionConfig(heads=4, kv_heads=2), position=Rotary()
    )
    layer = Attention(qk_norm=norm).build(shape)
    gains = [None, None]
    if layer.qk_norm is not None and list(layer.qk_norm.parameters()):
        gains = [layer.qk_norm.query.weight, layer.qk_norm.key.weight]
        for gain in gains:
            torch.nn.init.normal_(gain)
    x, rows = torch.randn(5, 24), Packing.from_mask(torch.ones(1, 5, dtype=torch.bool))
    heads = layer.qkv(x).unflatten(-1, (8, 6)).split([4, 2, 2], 1)
    rotate, changed = Rotary().rotation(position, head_dim=6), []
    for each, gain in zip(heads[:2], gains, strict=True):
        after = isinstance(norm, L2QKNorm)
        each = rotate(each) if after else NORMS[norm](each, gain)
        changed.append(NORMS[norm](each, gain) if after else rotate(each))
    query, key = (each.repeat_interleave(4 // each.shape[1], 1) for each in changed)
    score = torch.einsum("ihd,jhd->hij", query, key) * 6**-0.5
    weight = score.masked_fill(position[:, None] < position, float("-inf")).softmax(-1)
    mixed = torch.einsum("hij,jhd->ihd", weight, heads[2].repeat_interleave(2, 1))
    context = MixerContext.of_rows(rows, causal=True)
    torch.testing.assert_close(
        layer(x, context=context), layer.out(mixed.flatten(1)), rtol=1e-4, atol=1e-5
    )


def test_norms_across_heads_are_refused_by_tensor_ranks_with_the_reason():
    assert "all heads" in str(AcrossHeadsQKNorm().tensor_refusal())
    assert PerHeadQKNorm().tensor_refusal() is None
