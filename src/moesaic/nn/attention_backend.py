"""Attention backends: compute attention, given queries, keys and values.

``LocalAttention`` needs all tokens of a row on this rank; ``parallel/`` has the backends of context
parallelism.

Letters: B rows, S source length, L target length, T tokens, H heads, G key/value heads, d head dim.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F

from moesaic.core.shapes import Bool, Float, Int, Tensor
from moesaic.nn.attention_scores import AttentionScores
from moesaic.nn.packing import Packing
from moesaic.nn.softmax_attention import attend_rows


@dataclass(frozen=True, slots=True)
class KeyValue:
    """Keys and values, padded into rows; also one layer's KV cache.

    With ``packing`` they are instead [t, G, d], packed, of the tokens of this rank, for a backend
    that does not pad.
    """

    key: Float[Tensor, "B G S d"]
    value: Float[Tensor, "B G S d"]
    packing: Packing | None = None

    def select(self, rows: Int[Tensor, "R"]) -> "KeyValue":
        """Take some batch rows, in any order and number."""
        return KeyValue(self.key.index_select(0, rows), self.value.index_select(0, rows))

    def gather(self, place: Int[Tensor, "B N"]) -> "KeyValue":
        """Take some places of each row, in any order and number."""
        index = place[:, None, :, None]
        return KeyValue(*(torch.take_along_dim(x, index, 2) for x in (self.key, self.value)))

    def grow(self, length: int) -> "KeyValue":
        """Return a cache with capacity for ``length`` tokens or more (zeros); grows by doubling."""
        have = self.key.shape[2]
        if have >= length:
            return self
        extra = (0, 0, 0, max(length, 2 * have) - have)
        return KeyValue(F.pad(self.key, extra), F.pad(self.value, extra))

    def write(self, new: "KeyValue", *, position: Int[Tensor, "B n"]) -> None:
        """Store new keys and values at each row's positions, in place."""
        row = torch.arange(position.shape[0], device=position.device)[:, None]
        self.key.transpose(1, 2)[row, position] = new.key.transpose(1, 2)
        self.value.transpose(1, 2)[row, position] = new.value.transpose(1, 2)


@dataclass(frozen=True, slots=True)
class QueryKeyValue:
    """Queries, keys and values of ``packing.gathered_tokens``, packed."""

    query: Float[Tensor, "T H d"]
    key: Float[Tensor, "T G d"]
    value: Float[Tensor, "T G d"]


@runtime_checkable
class AttentionBackend(Protocol):
    """Attention within each row, wherever the tokens of the row are."""

    def self_attention(
        self, heads: QueryKeyValue, *, packing: Packing, scores: AttentionScores
    ) -> Float[Tensor, "T HD"]:
        """Self-attention within each row."""
        ...

    def project_source(
        self, key: Float[Tensor, "T G d"], value: Float[Tensor, "T G d"], *, packing: Packing
    ) -> KeyValue:
        """Prepare a source's keys and values for ``cross_attention``, once per layer and batch."""
        ...

    def cross_attention(
        self,
        query: Float[Tensor, "T H d"],
        *,
        packing: Packing,
        source: KeyValue,
        mask: Bool[Tensor, "B 1 1 S"] | None,
        scores: AttentionScores,
    ) -> Float[Tensor, "T HD"]:
        """Attention to the prepared source, where ``mask`` is true (None: everywhere)."""
        ...


class LocalAttention:
    """Attention by PyTorch's kernels: all tokens of a row are on this rank."""

    def self_attention(
        self, heads: QueryKeyValue, *, packing: Packing, scores: AttentionScores
    ) -> Float[Tensor, "T HD"]:
        keys = self.project_source(heads.key, heads.value, packing=packing)
        query, mask = pad_heads(heads.query, packing), packing.key_mask
        return packing.pack(attend(query, keys, mask=mask, scores=scores))

    def project_source(
        self, key: Float[Tensor, "T G d"], value: Float[Tensor, "T G d"], *, packing: Packing
    ) -> KeyValue:
        return KeyValue(pad_heads(key, packing), pad_heads(value, packing))

    def cross_attention(
        self,
        query: Float[Tensor, "T H d"],
        *,
        packing: Packing,
        source: KeyValue,
        mask: Bool[Tensor, "B 1 1 S"] | None,
        scores: AttentionScores,
    ) -> Float[Tensor, "T HD"]:
        return packing.pack(attend(pad_heads(query, packing), source, mask=mask, scores=scores))


def pad_heads(heads: Float[Tensor, "T H d"], packing: Packing) -> Float[Tensor, "B H S d"]:
    """Pad packed heads into rows."""
    rows = packing.pad(heads.flatten(1))
    return rows.unflatten(-1, heads.shape[1:]).transpose(1, 2)


def attend(
    query: Float[Tensor, "B H L d"],
    keys: KeyValue,
    *,
    mask: Bool[Tensor, "B 1 1 S"] | None,
    scores: AttentionScores,
) -> Float[Tensor, "B L HD"]:
    """Softmax attention in whole rows; returns the heads concatenated.

    ``mask`` is true at keys that are no padding (see ``attend_rows``).
    """
    mixed = attend_rows(query, keys.key, keys.value, scores=scores, key_mask=mask)
    return mixed.transpose(1, 2).flatten(2)
