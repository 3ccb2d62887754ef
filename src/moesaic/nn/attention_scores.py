"""Attention scores: which keys a query attends to, and what scores are beside ``q . k``.

Letters: B rows, n queries, m keys, H heads, N buckets.
"""

import math
from dataclasses import dataclass, replace

import torch

from moesaic.core.shapes import Bool, Float, Int, Tensor


@dataclass(frozen=True, slots=True)
class AttentionMask:
    """Which tokens of its row a token attends to; itself always.

    ``causal``: none after it. ``window``: those at a distance below ``window`` (sliding window,
    2004.05150; with ``causal`` the last ``window`` tokens, itself included). ``chunk``: those of
    its chunk, where the row is cut into chunks of ``chunk`` tokens.
    """

    causal: bool
    window: int | None = None
    chunk: int | None = None

    def visible(
        self, query: Int[Tensor, "*#B n"], key: Int[Tensor, "*#B m"]
    ) -> Bool[Tensor, "*B n m"]:
        """Return which keys the queries at these positions of a row attend to."""
        distance = query[..., :, None] - key[..., None, :]
        seen = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        if self.window is not None:
            seen = seen & (distance.abs() < self.window)
        if self.chunk is not None:
            seen = seen & (query[..., :, None] // self.chunk == key[..., None, :] // self.chunk)
        return seen

    def keys_of(self, start: int, stop: int) -> tuple[int, int]:
        """Return (first, after the last) of the keys for the queries ``start`` to ``stop - 1``."""
        first, last = self._reach(start, stop)
        return first, stop if self.causal else last

    def queries_of(self, start: int, stop: int) -> tuple[int, int]:
        """Return (first, after the last) of the queries for the keys ``start`` to ``stop - 1``."""
        first, last = self._reach(start, stop)
        return start if self.causal else first, last

    def _reach(self, start: int, stop: int) -> tuple[int, int]:
        """Return what is in reach of ``start`` to ``stop - 1`` on either side."""
        first, last = 0, 2**62
        if self.window is not None:
            first, last = max(first, start - self.window + 1), min(last, stop - 1 + self.window)
        if self.chunk is not None:
            chunk = self.chunk
            first, last = max(first, start // chunk * chunk), min(last, -(-stop // chunk) * chunk)
        return first, last

    @property
    def num_cached(self) -> int | None:
        """The number of newest tokens that the next one may attend to, with itself; None: all."""
        return min(filter(None, (self.window, self.chunk)), default=None)

    def is_limited(self, length: int) -> bool:
        """Return whether window or chunks exclude a token of a row of ``length`` tokens."""
        return self.num_cached is not None and self.num_cached < length

    def num_pairs(self, length: int) -> int:
        """Return how many pairs of a query and its key a row of ``length`` tokens has."""
        if self.chunk is not None and self.chunk < length:
            inner, (full, rest) = replace(self, chunk=None), divmod(length, self.chunk)
            return full * inner.num_pairs(self.chunk) + inner.num_pairs(rest)
        reach = min(self.window or length, length)
        triangle = reach * (reach + 1) // 2 + (length - reach) * reach
        return triangle if self.causal else 2 * triangle - length


@dataclass(frozen=True, slots=True)
class RelativeBuckets:
    """T5's buckets of distances (1910.10683, section 2.1): exact near ones, then logarithmic.

    ``bidirectional``: half of the ``number`` buckets are for keys after the query. Keys at
    ``max_distance`` or further share the last one.
    """

    number: int
    max_distance: int
    bidirectional: bool

    def of(self, distance: Int[Tensor, "*N"]) -> Int[Tensor, "*N"]:
        """Return the buckets of distances (the key's position minus the query's)."""
        number, first = self.number, torch.zeros_like(distance)
        if self.bidirectional:
            number //= 2
            first, distance = (distance > 0) * number, distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = number // 2
        ratio = (distance.clamp(min=1).float() / exact).log() / math.log(self.max_distance / exact)
        far = (exact + (ratio * (number - exact)).long()).clamp(max=number - 1)
        return first + torch.where(distance < exact, distance, far)


@dataclass(frozen=True, slots=True)
class ScoreBias:
    """A learned bias of the scores by bucket of distance and head (T5, 1910.10683)."""

    table: Float[Tensor, "N H"]
    buckets: RelativeBuckets

    def at(
        self, query: Int[Tensor, "*#B n"], key: Int[Tensor, "*#B m"]
    ) -> Float[Tensor, "*B H n m"]:
        """Return the bias of these positions."""
        return self.table[self.bucket(query, key)].movedim(-1, -3)

    def bucket(
        self, query: Int[Tensor, "*#B n"], key: Int[Tensor, "*#B m"]
    ) -> Int[Tensor, "*B n m"]:
        """Return the rows of the table for these positions."""
        return self.buckets.of(key[..., None, :] - query[..., :, None])


@dataclass(frozen=True, slots=True)
class AttentionScores:
    """What attention needs beside queries, keys and values.

    Scores are ``scale * q . k`` (None: ``d ** -0.5``); with ``softcap`` c they are
    ``c tanh(scores / c)`` (Gemma 2, 2408.00118). ``bias`` is added. ``sinks``: the softmax of each
    head has one more term with this logit and no value (attention sinks, 2309.17453, as learned in
    GPT-OSS, 2508.10925), so that a head may attend to nothing.
    """

    mask: AttentionMask
    scale: float | None = None
    softcap: float | None = None
    sinks: Float[Tensor, "H"] | None = None
    bias: ScoreBias | None = None

    def of_heads(self, heads: slice) -> "AttentionScores":
        """Return the same for some of the heads."""
        bias = self.bias and replace(self.bias, table=self.bias.table[:, heads])
        return replace(self, sinks=None if self.sinks is None else self.sinks[heads], bias=bias)

    def scale_of(self, head_dim: int) -> float:
        """Return the factor of ``q . k``."""
        return head_dim**-0.5 if self.scale is None else self.scale
