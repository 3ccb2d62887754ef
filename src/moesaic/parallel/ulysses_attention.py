"""Ulysses: tokens change places with heads, so that each rank looks at whole rows with a few heads.

DeepSpeed-Ulysses (2309.14509, section 3): between the products, which are token by token, one
exchange gives every rank all tokens of its heads, and another one takes back what they found.

Letters: T tokens of all parts, t tokens of this one, H query heads, G key/value heads, h those of
this rank, d head dim.
"""

from collections.abc import Sequence

import torch

from moesaic.core.shapes import Bool, Float, Tensor
from moesaic.distributed.collectives import all_to_all
from moesaic.distributed.process_groups import Group, group_rank, group_size
from moesaic.nn.attention_backend import KeyValue, LocalAttention, QueryKeyValue
from moesaic.nn.packing import Packing


class UlyssesAttention:
    """A ``AttentionBackend`` whose parts are the ranks of ``group``, in order; G is ``groups``.

    Query heads are dealt in runs, as evenly as they go. A key/value head goes to every rank whose
    queries read it (several, where G does not divide by the ranks), and its gradients add up on the
    way back.
    """

    def __init__(self, group: Group, *, kv_heads: int) -> None:
        self._group, self._groups, self._here = group, kv_heads, LocalAttention()
        self._ranks, self._rank = group_size(group), group_rank(group)

    @staticmethod
    def problems(*, heads: int, ranks: int) -> str | None:
        """Return why so many ranks cannot share ``heads`` query heads, or None."""
        if heads >= ranks:
            return None
        return (
            f"Ulysses gives each of {ranks} context ranks heads of its own, but an attention has "
            f"{heads} (on one tensor rank): take at most {heads} context ranks, or Ring"
        )

    def self_attention(
        self, heads: QueryKeyValue, *, packing: Packing, causal: bool
    ) -> Float[Tensor, "t HD"]:
        total = heads.query.shape[1]
        given = (heads.query, heads.key, heads.value)
        query, key, value = self._tokens_to_heads(given, queries=1, packing=packing)
        read = self._kv_head_of_each_query(query.shape[1], total=total)
        if read is not None:
            key, value = key[:, read], value[:, read]
        found = self._here.self_attention(
            QueryKeyValue(query, key, value), packing=packing, causal=causal
        )
        return self._heads_to_tokens(found, total=total, packing=packing)

    def project_source(
        self, key: Float[Tensor, "t G d"], value: Float[Tensor, "t G d"], *, packing: Packing
    ) -> KeyValue:
        spread = self._tokens_to_heads((key, value), queries=0, packing=packing)
        return self._here.project_source(*spread, packing=packing)

    def cross_attention(
        self,
        query: Float[Tensor, "t H d"],
        *,
        packing: Packing,
        source: KeyValue,
        mask: Bool[Tensor, "B 1 1 S"] | None,
    ) -> Float[Tensor, "t HD"]:
        (mine,) = self._tokens_to_heads((query,), queries=1, packing=packing)
        read = self._kv_head_of_each_query(mine.shape[1], total=query.shape[1])
        if read is not None:
            source = KeyValue(source.key[:, read], source.value[:, read])
        found = self._here.cross_attention(mine, packing=packing, source=source, mask=mask)
        return self._heads_to_tokens(found, total=query.shape[1], packing=packing)

    def _tokens_to_heads(
        self, given: Sequence[Float[Tensor, "t H d"]], *, queries: int, packing: Packing
    ) -> Sequence[Float[Tensor, "T h d"]]:
        """Give each rank all tokens of its heads, in one exchange; the first are ``queries``."""
        width, blocks, mine = given[0].shape[2], [], []
        for rank in range(self._ranks):
            spans = [self._query_heads_of(x.shape[1], rank) for x in given[:queries]]
            spans += [self._kv_heads_of(rank) for _ in given[queries:]]
            parts = [x[:, span] for x, span in zip(given, spans, strict=True)]
            blocks.append(torch.cat(parts, 1).reshape(-1, width))
            if rank == self._rank:
                mine = [part.shape[1] for part in parts]
        sizes = self._part_sizes(packing)
        rows = all_to_all(
            torch.cat(blocks),
            group=self._group,
            input_splits=[block.shape[0] for block in blocks],
            output_splits=[size * sum(mine) for size in sizes],
        )
        return rows.view(sum(sizes), sum(mine), width).split(mine, 1)

    def _heads_to_tokens(
        self, found: Float[Tensor, "T hd"], *, total: int, packing: Packing
    ) -> Float[Tensor, "t HD"]:
        """Give each rank what all heads found for its tokens."""
        spans = [self._query_heads_of(total, rank) for rank in range(self._ranks)]
        heads = [span.stop - span.start for span in spans]
        sizes, mine = self._part_sizes(packing), heads[self._rank]
        rows = all_to_all(
            found.reshape(sum(sizes) * mine, found.shape[1] // mine),
            group=self._group,
            input_splits=[size * mine for size in sizes],
            output_splits=[sizes[self._rank] * count for count in heads],
        )
        blocks = rows.split([sizes[self._rank] * count for count in heads])
        parts = [b.view(-1, c * rows.shape[1]) for b, c in zip(blocks, heads, strict=True)]
        return torch.cat(parts, 1)

    def _part_sizes(self, packing: Packing) -> Sequence[int]:
        division = packing.partition
        return [packing.num_tokens] if division is None else division.context_sizes

    def _query_heads_of(self, heads: int, rank: int) -> slice:
        return slice(rank * heads // self._ranks, (rank + 1) * heads // self._ranks)

    def _kv_heads_of(self, rank: int) -> slice:
        """Return the key/value heads that the queries of a rank read, whatever their number."""
        return slice(
            rank * self._groups // self._ranks, -(-(rank + 1) * self._groups // self._ranks)
        )

    def _kv_head_of_each_query(self, queries: int, *, total: int) -> list[int] | None:
        """Return which of the key/value heads here each query reads; None if shared evenly."""
        share, held = total // self._groups, self._kv_heads_of(self._rank)
        first = self._query_heads_of(total, self._rank).start
        read = [(first + head) // share - held.start for head in range(queries)]
        groups = held.stop - held.start
        if queries % groups == 0 and read == [h * groups // queries for h in range(queries)]:
            return None
        return read
