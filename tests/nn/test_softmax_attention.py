"""Attention with windows, chunks, sinks, biases and soft caps equals its written-out definition."""

import math

import pytest
import torch

from moesaic.nn.attention_scores import AttentionMask, AttentionScores, RelativeBuckets, ScoreBias
from moesaic.nn.softmax_attention import Blocks, attend_positions, attend_rows
from ops.references import reference_attend_rows

HEADS, GROUPS, WIDTH, LENGTHS = 4, 2, 8, (150, 83)
MASKS = {
    "causal": {"causal": True},
    "bidirectional": {"causal": False},
    "window": {"causal": True, "window": 9},
    "window of one": {"causal": True, "window": 1},
    "wide window": {"causal": True, "window": 120},
    "window on both sides": {"causal": False, "window": 9},
    "chunks": {"causal": True, "chunk": 32},
    "bidirectional chunks": {"causal": False, "chunk": 32},
    "windows in chunks": {"causal": True, "chunk": 32, "window": 5},
}
PARTS = {
    "plain": (),
    "scale": ("scale",),
    "sinks": ("sinks",),
    "bias": ("bias",),
    "softcap": ("softcap",),
    "all": ("scale", "sinks", "bias", "softcap"),
    "sinks and bias": ("sinks", "bias"),
}


def scores_of(mask, parts):
    drawn = {
        "scale": 0.7,
        "softcap": 1.5,
        "sinks": torch.randn(HEADS, requires_grad=True),
        "bias": ScoreBias(
            torch.randn(8, HEADS, requires_grad=True),
            RelativeBuckets(number=8, max_distance=40, bidirectional=not mask["causal"]),
        ),
    }
    return AttentionScores(AttentionMask(**mask), **{part: drawn[part] for part in parts})


def leaves(inputs, scores):
    bias = [scores.bias.table] if scores.bias else []
    return [*inputs, *([] if scores.sinks is None else [scores.sinks]), *bias]


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("mask", MASKS)
def test_attention_equals_its_definition_with_gradients(mask, parts):
    scores, length = scores_of(MASKS[mask], PARTS[parts]), max(LENGTHS)
    query = torch.randn(2, HEADS, length, WIDTH, requires_grad=True)
    key, value = (torch.randn(2, GROUPS, length, WIDTH, requires_grad=True) for _ in range(2))
    real = torch.arange(length) < torch.tensor(LENGTHS)[:, None]
    weight = torch.randn(2, HEADS, length, WIDTH) * real[:, None, :, None]
    results = []
    for function in (attend_rows, reference_attend_rows):
        out = function(query, key, value, scores=scores, key_mask=real[:, None, None])
        assert out.isfinite().all()
        found = torch.autograd.grad((out * weight).sum(), leaves((query, key, value), scores))
        results.append([out * real[:, None, :, None], *found])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("mask", [name for name in MASKS if MASKS[name]["causal"]])
def test_any_positions_are_those_of_whole_rows(mask, parts):
    scores, length = scores_of(MASKS[mask], PARTS[parts]), 40
    query = torch.randn(1, HEADS, length, WIDTH)
    key, value = (torch.randn(1, GROUPS, length, WIDTH) for _ in range(2))
    whole = reference_attend_rows(query, key, value, scores=scores, key_mask=None)
    order, some = torch.randperm(length), torch.tensor([[7, 39, 0]])
    missing = torch.cat([order, torch.tensor([-1])])[None]  # a place of the cache without a token
    got = attend_positions(
        query[:, :, some[0]],
        *(torch.cat([x[:, :, order], torch.randn(1, GROUPS, 1, WIDTH)], 2) for x in (key, value)),
        scores=scores,
        query_position=some,
        key_position=missing,
    )
    torch.testing.assert_close(got, whole[:, :, some[0]], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_the_pairs_of_a_mask_are_counted(mask):
    rule = AttentionMask(**MASKS[mask])
    for length in (1, 5, 32, 33, 150):
        place = torch.arange(length)
        assert rule.num_pairs(length) == int(rule.visible(place, place).sum())


@pytest.mark.parametrize("mask", ["window", "window on both sides", "chunks"])
def test_the_work_of_a_window_grows_with_length_times_window(mask, monkeypatch):
    rule, computed = AttentionMask(**MASKS[mask]), []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def counting(query, key, value, **options):
        computed.append(query.shape[0] * query.shape[2] * key.shape[2])
        return kernel(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
    for length in (256, 512, 1024):
        heads = torch.randn(1, 1, length, WIDTH)
        attend_rows(heads, heads, heads, scores=AttentionScores(rule), key_mask=None)
        assert computed.pop() == Blocks.of(rule, length=length).num_scores(length)
        assert Blocks.of(rule, length=length).num_scores(length) <= length * 4 * 64


def test_buckets_are_those_of_t5():
    """Distance by distance, as in the paper's text: exact up to a half, then logarithmic."""
    rule = RelativeBuckets(number=32, max_distance=128, bidirectional=True)
    for distance in (0, 1, -1, 7, -7, 8, -15, 40, -127, 128, -5000):
        size, far = abs(distance), 8 + int(8 * math.log(max(abs(distance), 1) / 8) / math.log(16))
        want = 16 * (distance > 0) + (size if size < 8 else min(far, 15))
        assert rule.of(torch.tensor(distance)).item() == want
    causal = RelativeBuckets(number=8, max_distance=20, bidirectional=False)
    assert causal.of(torch.tensor([3, 0, -1, -3, -4, -7, -19, -20, -99])).tolist() == [
        *(0, 0, 1, 3, 4, 5, 7, 7, 7)
    ]
