"""Ring: keys and values travel from rank to rank, and each rank's queries look at all of them.

Ring attention (2310.01889): a rank holds the queries of its tokens and never more keys than those
of two parts. What a query found so far is kept with the logarithm of its denominator, so that
blocks can be added in any order. Sums are float32. In backward the scores are made again, block by
block, and the gradients of keys and values travel along with them.

Letters: t queries of this part, s keys of another one, n and m those of one block, H query heads,
G key/value heads, R = H / G, d head dim.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as distributed
from torch.autograd.function import once_differentiable

from moesaic.core.shapes import Bool, Float, Tensor
from moesaic.distributed.flight_recorder import record_collective
from moesaic.distributed.process_groups import Group, group_rank, group_size
from moesaic.nn.attention_backend import KeyValue, QueryKeyValue
from moesaic.nn.packing import Packing, TokenSpan
from moesaic.ops.blockwise_attention import (
    AttentionBackward,
    PartialAttention,
    attend_block,
    attend_block_backward,
    merge_block,
)


class RingAttention:
    """A ``AttentionBackend`` whose parts are the ranks of ``group``, in order.

    Blocks that no query looks at are left out (``TokenPartition.runs`` says which): causal attention does
    half of the work, as much on each rank if tokens are dealt in ``zigzag_split``.
    """

    def __init__(self, group: Group) -> None:
        self._group = group

    def self_attention(
        self, heads: QueryKeyValue, *, packing: Packing, causal: bool
    ) -> Float[Tensor, "t HD"]:
        route = RingSchedule(
            self._group, _runs_by_part(packing), _runs_by_part(packing), causal=causal
        )
        return _ring_attention(heads.query, heads.key, heads.value, route)

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
    ) -> Float[Tensor, "t HD"]:
        del mask  # it is true where there is a token, and nothing else travels
        if source.packing is None:
            raise TypeError("a ring can only look at what a ring has read")
        route = RingSchedule(
            self._group, _runs_by_part(packing), _runs_by_part(source.packing), causal=False
        )
        return _ring_attention(query, source.key, source.value, route)


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """Some neighbouring queries and keys of one row, by their places in their parts.

    Query i sees the keys up to ``i + diagonal``; None: all of them.
    """

    queries: slice
    keys: slice
    diagonal: int | None

    @staticmethod
    def of(query: TokenSpan, key: TokenSpan, *, causal: bool) -> "AttentionTile | None":
        """Return what one run sees of another of its row, every query something; None: nothing."""
        late = max(0, key.position - query.position) if causal else 0
        if late >= query.length:
            return None
        ahead = query.position + late - key.position
        seen = min(key.length, ahead + query.length - late) if causal else key.length
        return AttentionTile(
            slice(query.start + late, query.start + query.length),
            slice(key.start, key.start + seen),
            ahead if causal and ahead + 1 < seen else None,
        )


@dataclass(frozen=True, slots=True)
class RingSchedule:
    """Whose queries look at whose keys, by part, and how keys go round."""

    group: Group
    query_runs: Sequence[Sequence[TokenSpan]]
    key_runs: Sequence[Sequence[TokenSpan]]
    causal: bool

    @property
    def ranks(self) -> int:
        return group_size(self.group)

    def key_owner(self, step: int) -> int:
        """Return whose keys are here after so many steps."""
        return (group_rank(self.group) - step) % self.ranks

    def tiles(self, step: int) -> Iterator[AttentionTile]:
        """Yield what queries here look at among the keys that are here."""
        rows: dict[int, list[TokenSpan]] = defaultdict(list)
        for key in self.key_runs[self.key_owner(step)]:
            rows[key.row].append(key)
        for query in self.query_runs[self.key_owner(0)]:
            for key in rows[query.row]:
                block = AttentionTile.of(query, key, causal=self.causal)
                if block is not None:
                    yield block

    def send_to_next_rank(
        self, held: Float[Tensor, "s C d"], *, step: int, tag: int
    ) -> "PendingTransfer":
        """Begin to give the next rank what is here, and to receive what comes after ``step``."""
        tokens = sum(run.length for run in self.key_runs[self.key_owner(step + 1)])
        arriving = held.new_empty(tokens, *held.shape[1:])
        if self.group is None or self.ranks == 1:
            return PendingTransfer(held, held, ())
        own = group_rank(self.group)
        to, from_ = (
            distributed.get_global_rank(self.group, rank % self.ranks)
            for rank in (own + 1, own - 1)
        )
        ends = [(distributed.isend, held, to), (distributed.irecv, arriving, from_)]
        moves = [
            distributed.P2POp(move, tensor, peer, self.group, tag)
            for move, tensor, peer in ends
            if tensor.numel()
        ]
        work = distributed.batch_isend_irecv(moves) if moves else []
        return PendingTransfer(held, arriving, tuple(work), self.group)


@dataclass(frozen=True, slots=True)
class PendingTransfer:
    """Rows on their way. ``sent`` is kept from being freed until they have left."""

    sent: Tensor
    arriving: Tensor
    work: tuple[Any, ...]
    group: Group = None

    def wait(self) -> Tensor:
        """Return what has arrived."""
        if self.group is not None:
            with record_collective("exchange", group=self.group):
                for move in self.work:
                    move.wait()
        return self.arriving


class _RingAttentionFunction(torch.autograd.Function):
    """Once round the ring; in backward once more, and home."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, route: RingSchedule) -> Tensor:
        asking = _grouped_query_heads(query, groups=key.shape[1])
        found = PartialAttention(
            torch.zeros_like(asking), torch.full_like(asking[..., 0], -math.inf)
        )
        held = torch.cat([key, value], 1)
        for step in range(route.ranks):
            coming = (
                route.send_to_next_rank(held, step=step, tag=0) if step + 1 < route.ranks else None
            )
            keys, values = _heads_first(held).chunk(2)
            for block in route.tiles(step):
                q, k = block.queries, block.keys
                part = PartialAttention(found.out[:, :, q], found.lse[:, :, q])
                seen = attend_block(
                    asking[:, :, q], keys[:, k], values[:, k], diagonal=block.diagonal
                )
                merge_block(part, seen)
            held = held if coming is None else coming.wait()
        out = _tokens_first(found.out).to(query.dtype)
        ctx.save_for_backward(query, key, value, out, found.lse)
        ctx.route = route
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, out, log = ctx.saved_tensors
        groups = key.shape[1]
        with torch.autocast(query.device.type, enabled=False):
            asking, grad = (
                _grouped_query_heads(query, groups=groups),
                _grouped_query_heads(grads[0], groups=groups),
            )
            back = AttentionBackward(
                grad, (grad * _grouped_query_heads(out, groups=groups)).sum(-1), log
            )
            held = torch.cat([key, value], 1)
            of_query, of_held = _ring_backward(ctx.route, asking=asking, held=held, back=back)
        of_key, of_value = of_held.chunk(2, 1)
        return (
            _tokens_first(of_query).to(query.dtype),
            of_key.to(key.dtype),
            of_value.to(value.dtype),
            None,
        )


def _ring_backward(
    route: RingSchedule, *, asking: Tensor, held: Tensor, back: AttentionBackward
) -> tuple[Float[Tensor, "G R t d"], Float[Tensor, "s 2G d"]]:
    """Return the gradients of the queries here, and of the keys and values that began here."""
    of_query, nothing = torch.zeros_like(asking), torch.zeros_like(held, dtype=asking.dtype)
    behind = PendingTransfer(nothing, nothing, (), None)
    for step in range(route.ranks):
        coming = route.send_to_next_rank(held, step=step, tag=0) if step + 1 < route.ranks else None
        asked = _heads_first(held)
        of_asked = torch.zeros_like(asked)
        for block in route.tiles(step):
            _add_tile_gradients(
                block, asking=asking, asked=asked, back=back, into=(of_query, of_asked)
            )
        of_held = of_asked.transpose(0, 1) + behind.wait()
        behind = route.send_to_next_rank(of_held.contiguous(), step=step, tag=1)
        held = held if coming is None else coming.wait()
    return of_query, behind.wait()


def _add_tile_gradients(
    block: AttentionTile,
    *,
    asking: Tensor,
    asked: Tensor,
    back: AttentionBackward,
    into: tuple[Tensor, Tensor],
) -> None:
    """Add a block's gradients, in place."""
    q, (of_query, of_asked) = block.queries, into
    key, value = asked[:, block.keys].chunk(2)
    part = AttentionBackward(back.grad_out[:, :, q], back.delta[:, :, q], back.lse[:, :, q])
    grads = attend_block_backward(
        asking[:, :, q], key, value, backward=part, diagonal=block.diagonal
    )
    of_query[:, :, q] += grads.query
    of_asked[:, block.keys] += torch.cat([grads.key, grads.value])


def _ring_attention(
    query: Tensor, key: Tensor, value: Tensor, route: RingSchedule
) -> Float[Tensor, "t HD"]:
    with torch.autocast(query.device.type, enabled=False):
        return _RingAttentionFunction.apply(query, key, value, route).flatten(1)


def _runs_by_part(packing: Packing) -> Sequence[Sequence[TokenSpan]]:
    if packing.partition is None or not packing.partition.spans:
        raise TypeError(
            "a ring needs to know the runs of every part: see parallel/context_parallel.py"
        )
    return packing.partition.spans


def _heads_first(x: Float[Tensor, "s G d"]) -> Float[Tensor, "G s d"]:
    return x.transpose(0, 1).to(torch.promote_types(x.dtype, torch.float32))


def _grouped_query_heads(x: Float[Tensor, "t H d"], *, groups: int) -> Float[Tensor, "G R t d"]:
    return _heads_first(x).unflatten(0, (groups, -1)).contiguous()


def _tokens_first(x: Float[Tensor, "G R t d"]) -> Float[Tensor, "t H d"]:
    return x.flatten(0, 1).transpose(0, 1)
