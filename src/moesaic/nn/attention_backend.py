"""Attention backends: compute attention, given queries, keys and values.

``LocalAttention`` needs all tokens of a row on this rank; ``parallel/`` has the backends of context
parallelism.

Letters: B rows, S source length, L target length, T tokens, H heads, G key/value heads, d head dim.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from moesaic.core.shapes import Bool, Float, Int, Tensor
from moesaic.nn.attention_scores import AttentionScores
from moesaic.nn.packing import Packing
from moesaic.nn.softmax_attention import attend_rows


@dataclass(frozen=True, slots=True)
class KeyValue:
    """Keys and values, padded into rows.

    With ``packing`` they are instead [t, G, d], packed, of the tokens of this rank, for a backend
    that does not pad.
    """

    key: Float[Tensor, "B G S d"]
    value: Float[Tensor, "B G S d"]
    packing: Packing | None = None

    def select(self, rows: Int[Tensor, "R"]) -> "KeyValue":
        """Take some batch rows, in any order and number."""
        return KeyValue(self.key.index_select(0, rows), self.value.index_select(0, rows))


class QueryKeyValue(NamedTuple):
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
        """Attention to the prepared source, where ``mask`` is true (None: everywhere).

        Equally many rows of the packing read each row of the source (the beams of a search).
        """
        ...


class LocalAttention:
    """Attention by PyTorch's kernels: all tokens of a row are on this rank."""

    def self_attention(
        self, heads: QueryKeyValue, *, packing: Packing, scores: AttentionScores
    ) -> Float[Tensor, "T HD"]:
        keys = self.project_source(heads.key, heads.value, packing=packing)
        # causal attention needs no mask: padding is on the right, after every real token
        mask = None if scores.mask.causal else packing.key_mask
        query = pad_heads(heads.query, packing)
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
        queries = pad_heads(query, packing, sources=source.key.shape[0])
        return packing.pack(attend(queries, source, mask=mask, scores=scores))


def pad_heads(
    heads: Float[Tensor, "T H d"], packing: Packing, *, sources: int | None = None
) -> Float[Tensor, "B H S d"]:
    """Pad packed heads into rows; with ``sources``, the rows of each are one after the other."""
    count, length = packing.rows, packing.length
    if sources:
        count, length = sources, count // sources * length
    if packing.is_reshape:
        return heads.unflatten(0, (count, length)).transpose(1, 2)
    return packing.pad(heads.flatten(1)).view(count, length, *heads.shape[1:]).transpose(1, 2)


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
