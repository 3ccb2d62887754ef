"""A mixture of attention experts equals the weighted sum of separate attentions."""

from dataclasses import replace

import pytest
import torch

from moesaic.moe.attention_experts import MixtureOfAttention
from moesaic.nn.attention import Attention
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.packing import Packing
from moesaic.nn.positional_encoding import Rotary
from moesaic.nn.sequence_mixer import MixerContext, MixerShape

DIM, N = 24, 3
HEADS = AttentionConfig(heads=4, kv_heads=2)
WIDTH = HEADS.head_width(DIM)
REAL = torch.arange(5) < torch.tensor([5, 2, 4])[:, None]
PACKING = Packing.from_mask(REAL)
SHAPE = MixerShape(DIM, causal=True, attention=HEADS, position=Rotary())


def _mixture(keys):
    made = MixtureOfAttention(experts=N, key_values=keys).build(SHAPE)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def _alone(made, *, keys, expert):
    """One expert as a separate attention, with its slice of the mixture's weights."""
    heads, groups = HEADS.heads, HEADS.num_kv_heads()
    one = Attention().build(SHAPE)
    sets = N if keys == "own" else 1
    sizes = [N * heads * WIDTH, sets * groups * WIDTH, sets * groups * WIDTH]
    query, key, value = made.attention.qkv.weight.split(sizes)
    order = (N, heads, WIDTH) if keys == "own" else (groups, N, heads // groups, WIDTH)
    axis, mine = (0 if keys == "own" else 1), expert
    query = query.view(*order, DIM).select(axis, mine).reshape(-1, DIM)
    which = expert if keys == "own" else 0
    key, value = (t.view(sets, -1, DIM)[which] for t in (key, value))
    out = made.attention.out.weight.view(DIM, *order).select(axis + 1, mine).reshape(DIM, -1)
    one.qkv.weight.data = torch.cat([query, key, value])
    one.out.weight.data = out
    return one


def _forward(module, x):
    return module(x, context=MixerContext.of_rows(PACKING, causal=True))


@pytest.mark.parametrize("keys", ["own", "shared"])
def test_a_mixture_is_the_weighted_sum_of_its_experts(keys):
    made, x = _mixture(keys), torch.randn(PACKING.num_tokens, DIM)
    share = torch.softmax(x @ made.gate.weight.t(), -1)
    alone = [_forward(_alone(made, keys=keys, expert=e), x) for e in range(N)]
    wanted = sum(share[:, e, None] * alone[e] for e in range(N))
    torch.testing.assert_close(_forward(made, x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keys", ["own", "shared"])
def test_one_expert_alone_is_plain_attention(keys):
    made = MixtureOfAttention(experts=1, key_values=keys).build(replace(SHAPE, bias=True))
    x = torch.randn(PACKING.num_tokens, DIM)
    torch.testing.assert_close(_forward(made, x), _forward(made.attention, x))


def test_own_keys_need_a_cache_per_expert():
    own, shared = (
        MixtureOfAttention(experts=N, key_values=keys).combined_attention(SHAPE)
        for keys in ("own", "shared")
    )
    assert own.num_kv_heads() == N * HEADS.num_kv_heads()
    assert shared.num_kv_heads() == HEADS.num_kv_heads()
    assert own.heads == shared.heads == N * HEADS.heads


@pytest.mark.parametrize("keys", ["own", "shared"])
def test_the_gate_gets_a_gradient_from_the_experts_outputs(keys):
    made, x = _mixture(keys), torch.randn(PACKING.num_tokens, DIM)
    weigh = torch.randn(PACKING.num_tokens, DIM)
    (_forward(made, x) * weigh).sum().backward()
    share = torch.softmax(x @ made.gate.weight.t(), -1)
    says = [(_forward(_alone(made, keys=keys, expert=e), x) * weigh).sum(1) for e in range(N)]
    dot = torch.stack(says, 1)
    slope = share * (dot - (share * dot).sum(1, keepdim=True))
    torch.testing.assert_close(made.gate.weight.grad, slope.t() @ x, rtol=1e-3, atol=1e-3)


def test_the_weights_are_float32_under_autocast():
    made, x = _mixture("own"), torch.randn(PACKING.num_tokens, DIM)
    plain = made.expert_weights(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(made.expert_weights(x), plain)
        assert _forward(made, x).dtype == torch.bfloat16
