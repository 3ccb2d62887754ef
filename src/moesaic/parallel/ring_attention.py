"""Ring attention: each rank's queries attend to keys and values that are sent from rank to rank.

Ring attention (2310.01889): a rank holds the queries of its tokens, and at any time the keys and
values of at most two context ranks. Partial outputs are kept with their log-sum-exp, so that tiles
can be merged in any order; sums are float32. Backward recomputes the scores tile by tile, and sends
the gradients of keys and values round the ring with them.

Letters: t queries of this rank, s keys of another one, H query heads, G key/value heads, R = H / G,
d head dim.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as distributed
from torch.autograd.function import once_differentiable

from moesaic.core.shapes import Bool, Float, Int, Tensor
from moesaic.distributed.flight_recorder import record_collective
from moesaic.distributed.process_groups import Group, group_rank, group_size
from moesaic.nn.attention_backend import KeyValue, QueryKeyValue
from moesaic.nn.attention_scores import AttentionMask, AttentionScores
from moesaic.nn.packing import Packing, TokenSpan
from moesaic.ops.blockwise_attention import (
    AttentionBackward,
    BlockScores,
    PartialAttention,
    attend_block,
    attend_block_backward,
    merge_block,
    merge_sinks,
    sink_gradient,
)


class RingAttention:
    """An ``AttentionBackend`` over the context ranks of ``group``, in order.

    Tiles in which no query attends to a key are skipped (``TokenPartition.spans`` has the tokens of
    each rank). Causal attention thus does half of the work, the same on each rank with
    ``zigzag_split``.
    """

    def __init__(self, group: Group) -> None:
        self._group = group

    def self_attention(
        self, heads: QueryKeyValue, *, packing: Packing, scores: AttentionScores
    ) -> Float[Tensor, "t HD"]:
        spans = _spans_by_rank(packing)
        ring = RingSchedule(self._group, spans, spans, scores=scores)
        return _ring_attention(heads.query, heads.key, heads.value, ring)

    def project_source(
        self, key: Float[Tensor, "s G d"], value: Float[Tensor, "s G d"], *, packing: Packing
    ) -> KeyValue:
        return KeyValue(key, value, packing=packing)

    def cross_attention(
        self,
        query: Float[Tensor, "t H d"],
        *,
        packing: Packing,
        source: KeyValue,
        mask: Bool[Tensor, "B 1 1 S"] | None,
        scores: AttentionScores,
    ) -> Float[Tensor, "t HD"]:
        del mask  # padding is never in the ring
        if source.packing is None:
            raise TypeError("ring attention needs a source from its own project_source")
        spans, source_spans = _spans_by_rank(packing), _spans_by_rank(source.packing)
        ring = RingSchedule(self._group, spans, source_spans, scores=scores)
        return _ring_attention(query, source.key, source.value, ring)


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """Consecutive queries and keys of one row, as slices of their ranks' tokens.

    ``first_query`` and ``first_key`` are their positions in the row. ``masked``: some query does
    not attend to some key.
    """

    queries: slice
    keys: slice
    first_query: int
    first_key: int
    masked: bool

    @staticmethod
    def of(query: TokenSpan, key: TokenSpan, *, mask: AttentionMask) -> "AttentionTile | None":
        """Return the tile of two spans of one row, without queries or keys that are all masked.

        None if nothing is left.
        """
        low, high = mask.queries_of(key.position, key.position + key.length)
        first, stop = _overlap(query, low, high)
        if first >= stop:
            return None
        first_key, stop_key = _overlap(key, *mask.keys_of(first, stop))
        (low, _), (_, high) = mask.keys_of(stop - 1, stop), mask.keys_of(first, first + 1)
        return AttentionTile(
            slice(query.start + first - query.position, query.start + stop - query.position),
            slice(key.start + first_key - key.position, key.start + stop_key - key.position),
            first,
            first_key,
            masked=low > first_key or high < stop_key,
        )

    def block_scores(self, scores: AttentionScores, *, groups: int, like: Tensor) -> BlockScores:
        """Return how the scores of the tile are computed, for ``groups`` key/value heads."""
        scale = scores.scale_of(like.shape[-1])
        if not self.masked and scores.bias is None:
            return BlockScores(scale, softcap=scores.softcap)
        query, key = self.positions(like.device)
        return BlockScores(
            scale,
            scores.mask.visible(query, key) if self.masked else None,
            scores.softcap,
            scores.bias and scores.bias.at(query, key).float().unflatten(0, (groups, -1)),
        )

    def positions(self, device: torch.device) -> tuple[Int[Tensor, "n"], Int[Tensor, "m"]]:
        """Return the positions of the queries and of the keys."""
        queries, keys = (span.stop - span.start for span in (self.queries, self.keys))
        return (
            torch.arange(self.first_query, self.first_query + queries, device=device),
            torch.arange(self.first_key, self.first_key + keys, device=device),
        )


def _overlap(span: TokenSpan, low: int, high: int) -> tuple[int, int]:
    return max(span.position, low), min(span.position + span.length, high)


@dataclass(frozen=True, slots=True)
class RingSchedule:
    """The tiles of each step of the ring, and the transfers between steps.

    ``query_spans`` and ``key_spans`` are the tokens of each rank.
    """

    group: Group
    query_spans: Sequence[Sequence[TokenSpan]]
    key_spans: Sequence[Sequence[TokenSpan]]
    scores: AttentionScores

    @property
    def ranks(self) -> int:
        return group_size(self.group)

    def key_owner(self, step: int) -> int:
        """Return the rank whose keys are held here after ``step`` transfers."""
        return (group_rank(self.group) - step) % self.ranks

    def tiles(self, step: int) -> Iterator[AttentionTile]:
        """Yield the tiles of this rank's queries and the keys of ``step``."""
        keys_of_row: dict[int, list[TokenSpan]] = defaultdict(list)
        for key in self.key_spans[self.key_owner(step)]:
            keys_of_row[key.row].append(key)
        for query in self.query_spans[self.key_owner(0)]:
            for key in keys_of_row[query.row]:
                tile = AttentionTile.of(query, key, mask=self.scores.mask)
                if tile is not None:
                    yield tile

    def send_to_next_rank(
        self, rows: Float[Tensor, "s C d"], *, step: int, tag: int
    ) -> "PendingTransfer":
        """Start to send the rows of ``step`` and to receive those of the step after it."""
        tokens = sum(span.length for span in self.key_spans[self.key_owner(step + 1)])
        received = rows.new_empty(tokens, *rows.shape[1:])
        group = self.group
        if group is None or self.ranks == 1:
            return PendingTransfer(rows, rows, ())
        rank = group_rank(group)
        next_rank, previous_rank = (
            distributed.get_global_rank(group, peer % self.ranks) for peer in (rank + 1, rank - 1)
        )
        transfers = (
            (distributed.isend, rows, next_rank),
            (distributed.irecv, received, previous_rank),
        )
        ops = [
            distributed.P2POp(op, tensor, peer, group, tag)
            for op, tensor, peer in transfers
            if tensor.numel()
        ]
        work = distributed.batch_isend_irecv(ops) if ops else []
        return PendingTransfer(rows, received, tuple(work), group)


@dataclass(frozen=True, slots=True)
class PendingTransfer:
    """Rows being sent and received. ``sent`` keeps its memory from being freed before."""

    sent: Tensor
    received: Tensor
    work: tuple[Any, ...]
    group: Group = None

    def wait(self) -> Tensor:
        """Return the received rows."""
        if self.group is not None:
            with record_collective("exchange", group=self.group):
                for work in self.work:
                    work.wait()
        return self.received


class _RingAttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        ring: RingSchedule,
        *_learned: Tensor | None,  # sinks and bias table of ring.scores: they have gradients
    ) -> Tensor:
        groups = key.shape[1]
        queries = _grouped_query_heads(query, groups=groups)
        lse = torch.full_like(queries[..., 0], -math.inf)
        total, rows = PartialAttention(torch.zeros_like(queries), lse), torch.cat([key, value], 1)
        for step in range(ring.ranks):
            last = step + 1 == ring.ranks
            transfer = None if last else ring.send_to_next_rank(rows, step=step, tag=0)
            keys, values = _heads_first(rows).chunk(2)
            for tile in ring.tiles(step):
                q, k = tile.queries, tile.keys
                score = tile.block_scores(ring.scores, groups=groups, like=keys)
                block = attend_block(queries[:, :, q], keys[:, k], values[:, k], score=score)
                merge_block(PartialAttention(total.out[:, :, q], total.lse[:, :, q]), block)
            rows = rows if transfer is None else transfer.wait()
        if ring.scores.sinks is not None:
            merge_sinks(total, ring.scores.sinks.float().view(groups, -1))
        out = _tokens_first(total.out).to(query.dtype)
        ctx.save_for_backward(query, key, value, out, total.lse)
        ctx.ring = ring
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, out, lse = ctx.saved_tensors
        scores, groups = ctx.ring.scores, key.shape[1]
        with torch.autocast(query.device.type, enabled=False):
            queries, grad, output = (
                _grouped_query_heads(x, groups=groups) for x in (query, grads[0], out)
            )
            saved = AttentionBackward(grad, (grad * output).sum(-1), lse)
            found = _ring_backward(
                ctx.ring, queries=queries, rows=torch.cat([key, value], 1), saved=saved
            )
            sinks = scores.sinks
            if sinks is not None:
                sink_grad = sink_gradient(sinks.float().view(groups, -1), saved).flatten()
                sinks = sink_grad.to(sinks.dtype)
        key_grad, value_grad = found.rows.chunk(2, 1)
        query_grad = _tokens_first(found.query).to(query.dtype)
        bias = scores.bias and found.bias.to(scores.bias.table.dtype)
        return query_grad, key_grad.to(key.dtype), value_grad.to(value.dtype), None, sinks, bias


class _RingGradients(NamedTuple):
    """Gradients of this rank's queries, of its keys and values, and of the bias table."""

    query: Float[Tensor, "G R t d"]
    rows: Float[Tensor, "s 2G d"]
    bias: Float[Tensor, "N H"]


def _ring_backward(
    ring: RingSchedule, *, queries: Tensor, rows: Tensor, saved: AttentionBackward
) -> _RingGradients:
    query_grad, zeros = torch.zeros_like(queries), torch.zeros_like(rows, dtype=queries.dtype)
    scores, groups = ring.scores, queries.shape[0]
    bias_grad = queries.new_zeros(scores.bias.table.shape if scores.bias else (0, 0))
    # gradients of keys follow one step behind the keys
    grad_transfer = PendingTransfer(zeros, zeros, ())
    for step in range(ring.ranks):
        last = step + 1 == ring.ranks
        transfer = None if last else ring.send_to_next_rank(rows, step=step, tag=0)
        keys_values = _heads_first(rows)
        step_grad = torch.zeros_like(keys_values)
        for tile in ring.tiles(step):
            q = tile.queries
            key, value = keys_values[:, tile.keys].chunk(2)
            grads = attend_block_backward(
                queries[:, :, q],
                key,
                value,
                backward=AttentionBackward(*(each[:, :, q] for each in saved)),
                score=tile.block_scores(scores, groups=groups, like=key),
            )
            query_grad[:, :, q] += grads.query
            step_grad[:, tile.keys] += torch.cat([grads.key, grads.value])
            if scores.bias is not None:
                bucket = scores.bias.bucket(*tile.positions(rows.device)).flatten()
                bias_grad.index_add_(0, bucket, grads.score.flatten(2).flatten(0, 1).t())
        rows_grad = step_grad.transpose(0, 1) + grad_transfer.wait()
        grad_transfer = ring.send_to_next_rank(rows_grad.contiguous(), step=step, tag=1)
        rows = rows if transfer is None else transfer.wait()
    return _RingGradients(query_grad, grad_transfer.wait(), bias_grad)


def _ring_attention(
    query: Tensor, key: Tensor, value: Tensor, ring: RingSchedule
) -> Float[Tensor, "t HD"]:
    scores = ring.scores
    learned = (scores.sinks, scores.bias and scores.bias.table)
    with torch.autocast(query.device.type, enabled=False):
        return _RingAttentionFunction.apply(query, key, value, ring, *learned).flatten(1)


def _spans_by_rank(packing: Packing) -> Sequence[Sequence[TokenSpan]]:
    if packing.partition is None or not packing.partition.spans:
        raise TypeError(
            "ring attention needs the token spans of every context rank, which "
            "parallel/context_parallel.py: SequenceSharder computes"
        )
    return packing.partition.spans


def _heads_first(x: Float[Tensor, "s G d"]) -> Float[Tensor, "G s d"]:
    return x.transpose(0, 1).to(torch.promote_types(x.dtype, torch.float32))


def _grouped_query_heads(x: Float[Tensor, "t H d"], *, groups: int) -> Float[Tensor, "G R t d"]:
    return _heads_first(x).unflatten(0, (groups, -1)).contiguous()


def _tokens_first(x: Float[Tensor, "G R t d"]) -> Float[Tensor, "t H d"]:
    return x.flatten(0, 1).transpose(0, 1)
