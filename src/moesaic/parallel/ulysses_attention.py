"""Ulysses attention: an all-to-all from token shards to head shards, local attention, and back.

DeepSpeed-Ulysses (2309.14509, section 3): one all-to-all gives every context rank all tokens of its
heads, a second one returns each rank the outputs of all heads for its tokens.

Letters: T tokens of all context ranks, t tokens of this one, H query heads, G key/value heads, h
heads of this rank, d head dim.
"""

from collections.abc import Sequence

import torch

from moesaic.core.shapes import Bool, Float, Tensor
from moesaic.distributed.collectives import all_to_all
from moesaic.distributed.process_groups import Group, group_rank, group_size
from moesaic.nn.attention_backend import KeyValue, LocalAttention, QueryKeyValue
from moesaic.nn.attention_scores import AttentionScores
from moesaic.nn.packing import Packing


class UlyssesAttention:
    """An ``AttentionBackend`` over the context ranks of ``group``, in order; G is ``kv_heads``.

    Each rank computes consecutive query heads, as evenly many as possible. A key/value head is sent
    to every rank whose queries read it (to several where G is no multiple of the ranks), and its
    gradient is the sum over them.
    """

    def __init__(self, group: Group, *, kv_heads: int) -> None:
        self._group, self._kv_heads, self._local = group, kv_heads, LocalAttention()
        self._ranks, self._rank = group_size(group), group_rank(group)

    def self_attention(
        self, heads: QueryKeyValue, *, packing: Packing, scores: AttentionScores
    ) -> Float[Tensor, "t HD"]:
        total = heads.query.shape[1]
        query, key, value = self._tokens_to_heads(
            (heads.query, heads.key, heads.value), queries=1, packing=packing
        )
        read = self._kv_head_of_each_query(query.shape[1], total=total)
        if read is not None:
            key, value = key[:, read], value[:, read]
        heads = QueryKeyValue(query, key, value)
        scores = scores.of_heads(self._query_heads_of(total, self._rank))
        out = self._local.self_attention(heads, packing=packing, scores=scores)
        return self._heads_to_tokens(out, total=total, packing=packing)

    def project_source(
        self, key: Float[Tensor, "t G d"], value: Float[Tensor, "t G d"], *, packing: Packing
    ) -> KeyValue:
        key, value = self._tokens_to_heads((key, value), queries=0, packing=packing)
        return self._local.project_source(key, value, packing=packing)

    def cross_attention(
        self,
        query: Float[Tensor, "t H d"],
        *,
        packing: Packing,
        source: KeyValue,
        mask: Bool[Tensor, "B 1 1 S"] | None,
        scores: AttentionScores,
    ) -> Float[Tensor, "t HD"]:
        (local,) = self._tokens_to_heads((query,), queries=1, packing=packing)
        read = self._kv_head_of_each_query(local.shape[1], total=query.shape[1])
        if read is not None:
            source = KeyValue(source.key[:, read], source.value[:, read])
        scores = scores.of_heads(self._query_heads_of(query.shape[1], self._rank))
        out = self._local.cross_attention(
            local, packing=packing, source=source, mask=mask, scores=scores
        )
        return self._heads_to_tokens(out, total=query.shape[1], packing=packing)

    def _tokens_to_heads(
        self, tensors: Sequence[Float[Tensor, "t H d"]], *, queries: int, packing: Packing
    ) -> Sequence[Float[Tensor, "T h d"]]:
        """Return all tokens of this rank's heads, in one all-to-all of all tensors.

        The first ``queries`` tensors have query heads, the others key/value heads.
        """
        head_dim, blocks, local_heads = tensors[0].shape[2], [], []
        for rank in range(self._ranks):
            heads = [self._query_heads_of(x.shape[1], rank) for x in tensors[:queries]]
            heads += [self._kv_heads_of(rank) for _ in tensors[queries:]]
            parts = [x[:, span] for x, span in zip(tensors, heads, strict=True)]
            blocks.append(torch.cat(parts, 1).reshape(-1, head_dim))
            if rank == self._rank:
                local_heads = [part.shape[1] for part in parts]
        sizes, count = self._tokens_by_rank(packing), sum(local_heads)
        rows = all_to_all(
            torch.cat(blocks),
            group=self._group,
            input_splits=[block.shape[0] for block in blocks],
            output_splits=[size * count for size in sizes],
        )
        return rows.view(sum(sizes), count, head_dim).split(local_heads, 1)

    def _heads_to_tokens(
        self, out: Float[Tensor, "T hd"], *, total: int, packing: Packing
    ) -> Float[Tensor, "t HD"]:
        """Return the outputs of all ``total`` heads for this rank's tokens."""
        spans = [self._query_heads_of(total, rank) for rank in range(self._ranks)]
        heads = [span.stop - span.start for span in spans]
        sizes, local_heads = self._tokens_by_rank(packing), heads[self._rank]
        received = [sizes[self._rank] * count for count in heads]
        rows = all_to_all(
            out.reshape(sum(sizes) * local_heads, out.shape[1] // local_heads),
            group=self._group,
            input_splits=[size * local_heads for size in sizes],
            output_splits=received,
        )
        blocks = rows.split(received)
        parts = [b.view(-1, c * rows.shape[1]) for b, c in zip(blocks, heads, strict=True)]
        return torch.cat(parts, 1)

    def _tokens_by_rank(self, packing: Packing) -> Sequence[int]:
        partition = packing.partition
        return [packing.num_tokens] if partition is None else partition.context_sizes

    def _query_heads_of(self, heads: int, rank: int) -> slice:
        return slice(rank * heads // self._ranks, (rank + 1) * heads // self._ranks)

    def _kv_heads_of(self, rank: int) -> slice:
        """Return the key/value heads that the query heads of a rank read."""
        kv_heads, ranks = self._kv_heads, self._ranks
        return slice(rank * kv_heads // ranks, -(-(rank + 1) * kv_heads // ranks))

    def _kv_head_of_each_query(self, queries: int, *, total: int) -> list[int] | None:
        """Return the local key/value head of each local query head; None if evenly grouped."""
        per_kv_head, local = total // self._kv_heads, self._kv_heads_of(self._rank)
        first = self._query_heads_of(total, self._rank).start
        read = [(first + head) // per_kv_head - local.start for head in range(queries)]
        count = local.stop - local.start
        if queries % count == 0 and read == [h * count // queries for h in range(queries)]:
            return None
        return read
