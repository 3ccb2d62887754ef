"""Softmax attention over padded rows, by PyTorch's kernels: masks, windows, sinks and biases.

A window is computed in blocks of queries, each with the keys in its reach, so that the work of a
row grows with length x window. Sinks are one more key for each row, and one more channel whose
query is the sink's logit: any kernel of ``F.scaled_dot_product_attention`` computes them.

Letters: B rows, L queries, S keys, H heads, G key/value heads, d head dim, e width of values.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from moesaic.core.shapes import Bool, Float, Int, Tensor
from moesaic.nn.attention_scores import AttentionMask, AttentionScores

MIN_BLOCK = 64  # queries of a block: fewer make kernels slow
SINK_CHANNELS = 8  # one would do; flash kernels take multiples of 8


class PaddedHeads(NamedTuple):
    """Queries, keys and values in rows."""

    query: Float[Tensor, "B H L d"]
    key: Float[Tensor, "B G S d"]
    value: Float[Tensor, "B G S e"]


def attend_rows(
    query: Float[Tensor, "B H L d"],
    key: Float[Tensor, "B G S d"],
    value: Float[Tensor, "B G S e"],
    *,
    scores: AttentionScores,
    key_mask: Bool[Tensor, "B 1 1 S"] | None,
) -> Float[Tensor, "B H L e"]:
    """Attend within whole rows; ``key_mask`` is true at keys that are no padding.

    Padding is on the right: where a mask is causal it is after every real query. Without a limiting
    mask queries and keys may be of different rows (cross-attention).
    """
    heads, length, mask = PaddedHeads(query, key, value), key.shape[2], scores.mask
    key_mask = None if mask.causal else key_mask
    blocks = Blocks.of(mask, length=length) if mask.is_limited(length) else None
    if blocks is not None:
        return _attend_in_blocks(heads, scores=scores, blocks=blocks, key_mask=key_mask)
    if not mask.is_limited(length) and scores.bias is None:
        return _attend(heads, scores=scores, allowed=key_mask, causal=mask.causal)
    place = torch.arange(length, device=key.device)
    bias = None if scores.bias is None else scores.bias.at(place, place)[None]
    allowed = _and_keys(mask.visible(place, place), key_mask)
    return _attend(heads, scores=scores, allowed=allowed, bias=bias)


def attend_positions(
    query: Float[Tensor, "B H L d"],
    key: Float[Tensor, "B G S d"],
    value: Float[Tensor, "B G S e"],
    *,
    scores: AttentionScores,
    query_position: Int[Tensor, "B L"],
    key_position: Int[Tensor, "#B S"],
) -> Float[Tensor, "B H L e"]:
    """Attend from and to any positions of each row; a negative one is no key (decoding)."""
    allowed = scores.mask.visible(query_position, key_position) & (key_position >= 0)[:, None]
    bias = None if scores.bias is None else scores.bias.at(query_position, key_position)
    heads = PaddedHeads(query, key, value)
    return _attend(heads, scores=scores, allowed=allowed[:, None], bias=bias)


def attend_allowed(
    query: Float[Tensor, "B H L d"],
    key: Float[Tensor, "B G S d"],
    value: Float[Tensor, "B G S e"],
    *,
    scores: AttentionScores,
    allowed: Bool[Tensor, "#B 1 #L S"] | None,
    bias: Float[Tensor, "B H L S"] | None,
) -> Float[Tensor, "B H L e"]:
    """Attend where ``allowed`` (None: everywhere), whatever the mask of ``scores``."""
    return _attend(PaddedHeads(query, key, value), scores=scores, allowed=allowed, bias=bias)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of ``size`` queries; each has the keys from ``before`` it to ``after`` it."""

    size: int
    before: int
    after: int

    @staticmethod
    def of(mask: AttentionMask, *, length: int) -> "Blocks | None":
        """Return the blocks for rows of ``length`` tokens; None where they would save nothing."""
        if mask.chunk is not None and (mask.window is None or mask.window >= mask.chunk):
            return Blocks(mask.chunk, 0, 0)
        before = min((mask.window or length) - 1, length)
        blocks = Blocks(max(before + 1, MIN_BLOCK), before, 0 if mask.causal else before)
        return blocks if 2 * blocks.num_scores(length) <= length**2 else None

    @property
    def keys(self) -> int:
        """The number of keys of a block."""
        return self.before + self.size + self.after

    def number(self, length: int) -> int:
        """Return how many blocks a row has."""
        return -(-length // self.size)

    def num_scores(self, length: int) -> int:
        """Return how many scores are computed for each head of a row."""
        return self.number(length) * self.size * self.keys


def _attend_in_blocks(
    heads: PaddedHeads, *, scores: AttentionScores, blocks: Blocks, key_mask: Tensor | None
) -> Float[Tensor, "B H L e"]:
    query, key, value = heads
    rows, length, number = query.shape[0], query.shape[2], blocks.number(query.shape[2])
    padding = number * blocks.size - length
    queries = _cut(F.pad(query, (0, 0, 0, padding)), width=blocks.size, step=blocks.size)
    keys, values = (
        _cut(
            F.pad(x, (0, 0, blocks.before, padding + blocks.after)),
            width=blocks.keys,
            step=blocks.size,
        )
        for x in (key, value)
    )
    place = torch.arange(length, device=query.device)
    allowed = _allowed_in_blocks(scores, blocks, place=place, key_mask=key_mask)
    if allowed is not None:
        allowed = allowed.expand(rows, -1, -1, -1).flatten(0, 1)[:, None]
    place = torch.arange(-blocks.before, blocks.size + blocks.after, device=query.device)
    bias = scores.bias and scores.bias.at(place[blocks.before :][: blocks.size], place)[None]
    cut = PaddedHeads(queries, keys, values)
    out = _attend(cut, scores=scores, allowed=allowed, bias=bias, causal=allowed is None)
    joined = out.unflatten(0, (rows, number)).transpose(1, 2).flatten(2, 3)
    return joined[:, :, :length]


def _cut(x: Float[Tensor, "B H S d"], *, width: int, step: int) -> Float[Tensor, "B*n H w d"]:
    """Return overlapping blocks of a row, each as a row."""
    return x.unfold(2, width, step).permute(0, 2, 1, 4, 3).flatten(0, 1)


def _allowed_in_blocks(
    scores: AttentionScores, blocks: Blocks, *, place: Int[Tensor, "L"], key_mask: Tensor | None
) -> Bool[Tensor, "#B n q k"] | None:
    """Return the keys that each query of each block attends to; None: a causal mask in each."""
    length, device, mask = len(place), place.device, scores.mask
    if mask.causal and blocks.keys == blocks.size == mask.chunk and scores.bias is None:
        return None
    first = place[:: blocks.size, None]
    query = first + torch.arange(blocks.size, device=device)
    key = first + torch.arange(-blocks.before, blocks.size + blocks.after, device=device)
    real = ((key >= 0) & (key < length))[None]
    if key_mask is not None:
        real = real & key_mask[:, 0, 0][:, key.clamp(0, length - 1)]
    # a padded query attends to its own place, so that no softmax is empty
    itself = query[:, :, None] == key[:, None]
    return (mask.visible(query, key) & real[:, :, None]) | itself


def _and_keys(
    allowed: Bool[Tensor, "L S"], key_mask: Bool[Tensor, "B 1 1 S"] | None
) -> Bool[Tensor, "#B 1 L S"]:
    if key_mask is None:
        return allowed[None, None]
    itself = torch.eye(*allowed.shape, dtype=torch.bool, device=allowed.device)
    return (allowed & key_mask) | itself


def _attend(
    heads: PaddedHeads,
    *,
    scores: AttentionScores,
    allowed: Bool[Tensor, "#B 1 #L S"] | None,
    bias: Float[Tensor, "#B H L S"] | None = None,
    causal: bool = False,
) -> Float[Tensor, "B H L e"]:
    if scores.softcap is not None:
        return _attend_with_softcap(heads, scores=scores, allowed=allowed, bias=bias, causal=causal)
    query, key, value = heads
    scale, start, width = scores.scale, 0, value.shape[-1]
    if scores.sinks is not None:
        scale, start = scores.scale_of(query.shape[-1]), int(causal)
        query, key, value = _with_sinks(heads, sinks=scores.sinks / scale)
        # the causal mask is a triangle from the first query and key: a query for the sink's place
        query = F.pad(query, (0, 0, start, 0))
        allowed = None if allowed is None else F.pad(allowed, (1, 0), value=True)
        bias = None if bias is None else F.pad(bias, (1, 0))
    if bias is not None:
        bias = bias.to(query.dtype)
        allowed = bias if allowed is None else bias.masked_fill(~allowed, float("-inf"))
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=allowed,
        is_causal=causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[:, :, start:, :width]


def _with_sinks(heads: PaddedHeads, *, sinks: Float[Tensor, "H"]) -> PaddedHeads:
    """Return them with a key in front whose score is the sink's logit, and without a value.

    Values are padded to the width of keys: fused kernels take one width.
    """
    query, key, value = heads
    logit = sinks.to(query.dtype)[:, None, None].expand(*query.shape[:3], 1)
    query = torch.cat([query, F.pad(logit, (0, SINK_CHANNELS - 1))], -1)
    sink = key.new_zeros(key.shape[-1] + SINK_CHANNELS)
    sink[-SINK_CHANNELS] = 1
    key = torch.cat([sink.expand(*key.shape[:2], 1, -1), F.pad(key, (0, SINK_CHANNELS))], 2)
    value = F.pad(value, (0, query.shape[-1] - value.shape[-1], 1, 0))
    return PaddedHeads(query, key, value)


def _attend_with_softcap(
    heads: PaddedHeads,
    *,
    scores: AttentionScores,
    allowed: Tensor | None,
    bias: Tensor | None,
    causal: bool,
) -> Float[Tensor, "B H L e"]:
    """Attention with all scores in memory: PyTorch's kernels have no soft cap."""
    query, key, value = heads
    shared, cap = query.shape[1] // key.shape[1], scores.softcap
    key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    score = query @ key.transpose(-1, -2) * scores.scale_of(query.shape[-1])
    score = cap * (score / cap).tanh() if cap else score
    score = score if bias is None else score + bias
    if causal:
        triangle = torch.ones(score.shape[2:], dtype=torch.bool, device=score.device).tril()
        allowed = triangle[None, None]
    if allowed is not None:
        score = score.masked_fill(~allowed, float("-inf"))
    if scores.sinks is not None:
        sink = scores.sinks[:, None, None].expand(*score.shape[:3], 1).to(score.dtype)
        return torch.cat([score, sink], -1).softmax(-1)[..., :-1] @ value
    return score.softmax(-1) @ value
