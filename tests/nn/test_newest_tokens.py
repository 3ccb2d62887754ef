"""Decoding an attention token by token equals one pass; a window's state is constant in length."""

import pytest
import torch

from mixer_cases import MIXERS
from moesaic.nn.attention import Attention
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.attention_parts import Chunks, LearnedSinks, SlidingWindow
from moesaic.nn.decode_slots import DecodeSlots
from moesaic.nn.latent_attention import LatentAttention
from moesaic.nn.packing import Packing
from moesaic.nn.positional_encoding import RelativeBias, Rotary
from moesaic.nn.sequence_mixer import MixerContext, MixerShape

DIM, LENGTH = 16, 11
HEADS = AttentionConfig(heads=4, kv_heads=2)
CASES = {
    name: mixer for name, mixer in MIXERS.items() if isinstance(mixer, Attention | LatentAttention)
} | {
    "latent in a window": MIXERS["latent"].replace(window=SlidingWindow(size=4)),
    "sinks": Attention(sinks=LearnedSinks()),
    "relative bias": Attention(),
    "chunks of four": Attention(window=Chunks(size=4)),
}


def built(name):
    bias = RelativeBias(buckets=8, max_distance=6)
    position = bias if name == "relative bias" else Rotary()
    shape = MixerShape(DIM, causal=True, attention=HEADS, position=position)
    layer = CASES[name].build(shape)
    for parameter in layer.parameters():  # sinks and gains away from their initial values
        torch.nn.init.normal_(parameter, std=0.4)
    return layer, bias.build_score_bias(4, causal=True)() if name == "relative bias" else None


@pytest.mark.parametrize("prompt", [(1, 1), (3, 1), (2, 5), (7, 7)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_decoding_equals_one_pass(name, prompt):
    layer, bias = built(name)
    x = torch.randn(2, LENGTH, DIM)
    rows = Packing.from_mask(torch.ones(2, LENGTH, dtype=torch.bool))
    whole = MixerContext(rows, rows.position, causal=True, score_bias=bias)
    want = layer(x.flatten(0, 1), context=whole).view(2, LENGTH, DIM)
    state, slots = layer.init_state(2, like=x), DecodeSlots.empty(2, device=x.device)
    done, counts = torch.zeros(2, dtype=torch.long), torch.tensor(prompt)
    while (done + counts <= LENGTH).all():
        packing = Packing.from_lengths(counts, length=int(counts.max()))
        slots.append(done, packing)
        position = done[packing.row] + packing.position
        context = MixerContext(packing, position, causal=True, slots=slots, score_bias=bias)
        got = layer(x[packing.row, position], context=context, state=state)
        torch.testing.assert_close(got, want[packing.row, position], rtol=1e-4, atol=1e-5)
        done, counts = done + counts, torch.ones_like(done)


def decoded_bytes(mixer, tokens, *, rows=2):
    """The bytes of the state after a prompt of so many tokens."""
    layer = mixer.build(MixerShape(DIM, causal=True, attention=HEADS, position=Rotary()))
    x, slots = torch.randn(rows * tokens, DIM), DecodeSlots.empty(rows, device=torch.device("cpu"))
    packing = Packing.from_mask(torch.ones(rows, tokens, dtype=torch.bool))
    state = layer.init_state(rows, like=x)
    slots.append(torch.zeros(rows, dtype=torch.long), packing)
    context = MixerContext(packing, packing.position, causal=True, slots=slots)
    layer(x, context=context, state=state)
    return state.nbytes


@pytest.mark.parametrize("window", [SlidingWindow(size=70), Chunks(size=70)], ids=repr)
def test_the_state_of_a_window_is_bounded(window):
    full = 4 * 2 * 2 * 70 * 2 * 4  # bytes, rows, keys and values, tokens, heads, channels
    sizes = [decoded_bytes(Attention(window=window), tokens) for tokens in (80, 200, 700)]
    assert sizes == [full] * 3
    assert decoded_bytes(Attention(window=window), 3) < full


def test_the_latent_state_has_the_latent_and_one_rotated_key_per_token():
    latent, one = MIXERS["latent"], 4 * (6 + 2)  # kv_rank + rope_dim
    assert decoded_bytes(latent, 100) == 2 * 200 * one  # rows, room of twice the prompt
    window = latent.replace(window=SlidingWindow(size=70))
    assert decoded_bytes(window, 100) == decoded_bytes(window, 300) == 2 * 70 * one
