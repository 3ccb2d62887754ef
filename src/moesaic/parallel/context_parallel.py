"""Context parallelism: shard the tokens of a batch over ranks, and attend across those ranks.

All ranks that share a batch's rows receive the ids of the whole batch, and each keeps its slice of
the packed token stream. Only attention mixes tokens, so the split affects nothing but how evenly
the attention work is balanced.

Letters: T tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import ClassVar

import torch

from moesaic.core.config import Choice
from moesaic.core.shapes import Int, Tensor
from moesaic.distributed.process_groups import Group
from moesaic.nn.attention_backend import AttentionBackend
from moesaic.nn.packing import Packing, TokenPartition, TokenSpan
from moesaic.parallel.ring_attention import RingAttention
from moesaic.parallel.ulysses_attention import UlyssesAttention

MAX_RUN_LENGTH = 1024

TokenSplit = Callable[[int, int], list[list[range]]]  # (tokens, parts) -> token ranges of each part


def contiguous_split(tokens: int, parts: int) -> list[list[range]]:
    """Split a stream into one range for each part; the first parts have the extra tokens."""
    return [[run] for run in _consecutive_ranges(even_sizes(tokens, parts))]


def zigzag_split(tokens: int, parts: int) -> list[list[range]]:
    """Split a stream into two ranges for each part, one from each end (load balancing).

    In causal attention late tokens attend to more keys than early ones. With one range from each
    end all parts of one long row have the same work; contiguous ranges do not (2311.09431, which
    stripes single tokens: ranges balance as well and keep neighbouring tokens together).
    """
    ranges = _consecutive_ranges(even_sizes(tokens, 2 * parts))
    return [[ranges[part], ranges[-1 - part]] for part in range(parts)]


@dataclass(frozen=True, slots=True)
class SequenceSharder:
    """Sequence sharding: selects the tokens of a packed stream that this rank holds.

    ``rank`` is this rank's index among the ``ranks`` that share a batch's rows. Groups of
    ``tensor_ranks`` neighbouring ranks form one context rank, which ``token_split`` assigns tokens
    to; within it each rank holds a contiguous share, possibly empty. Called once per stream and
    batch. Synchronizes with the device, as building a ``Packing`` does.
    """

    rank: int
    ranks: int
    tensor_ranks: int = 1
    token_split: TokenSplit = contiguous_split

    def __call__(self, packing: Packing) -> Packing:
        if self.ranks == 1:
            return packing
        parts = self.token_split(packing.num_tokens, self.ranks // self.tensor_ranks)
        order = _permutation([span for spans in parts for span in spans], like=packing.index)
        if order is not None:
            packing = replace(
                packing,
                index=packing.index[order],
                row=packing.row[order],
                position=packing.position[order],
                ordered=False,
            )
        sizes = [sum(map(len, spans)) for spans in parts]
        partition = TokenPartition(
            tuple(size for tokens in sizes for size in even_sizes(tokens, self.tensor_ranks)),
            rank=self.rank,
            tensor_ranks=self.tensor_ranks,
            spans=_token_spans(packing, sizes),
        )
        return replace(packing, partition=partition)


def even_sizes(tokens: int, parts: int) -> list[int]:
    """Return part sizes that differ by at most one, larger ones first."""
    size, rest = divmod(tokens, parts)
    return [size + (part < rest) for part in range(parts)]


def _consecutive_ranges(sizes: Sequence[int]) -> list[range]:
    return [range(start, stop) for start, stop in pairwise(accumulate(sizes, initial=0))]


def _permutation(ranges: Sequence[range], *, like: Int[Tensor, "T"]) -> Int[Tensor, "T"] | None:
    """Return the token indices of the ranges, one after the other; None if they are in order."""
    if all(one.stop == next_.start for one, next_ in pairwise(ranges)):
        return None
    return torch.cat([torch.arange(r.start, r.stop, device=like.device) for r in ranges])


def _token_spans(packing: Packing, sizes: Sequence[int]) -> tuple[tuple[TokenSpan, ...], ...]:
    """Return each part's spans of consecutive tokens of one row, of at most ``MAX_RUN_LENGTH``."""
    row, position = packing.row, packing.position
    new = (row.diff() != 0) | (position.diff() != 1)
    first = torch.cat([new.new_ones(min(1, len(row))), new]).nonzero()[:, 0]
    starts, rows, positions = torch.stack([first, row[first], position[first]]).tolist()
    ends = [*starts[1:], packing.num_tokens]
    runs = list(zip(map(range, starts, ends), rows, positions, strict=True))
    return tuple(_clip_runs(runs, part) for part in _consecutive_ranges(sizes))


def _clip_runs(runs: Sequence[tuple[range, int, int]], part: range) -> tuple[TokenSpan, ...]:
    """Return the token spans of runs (tokens, row, first position) that are inside ``part``."""
    return tuple(
        TokenSpan(
            row, position + first - run.start, first - part.start, min(MAX_RUN_LENGTH, stop - first)
        )
        for run, row, position in runs
        for stop in [min(run.stop, part.stop)]
        for first in range(max(run.start, part.start), stop, MAX_RUN_LENGTH)
    )


class ContextParallel(Choice):
    """Family: context parallelism, attention between tokens that different ranks hold.

    ``shards_heads``: each rank computes heads of its own, so their number bounds the ranks.
    """

    shards_heads: ClassVar[bool] = False

    def token_split(self) -> TokenSplit:
        """Return how the tokens of a stream are split over context ranks."""
        return contiguous_split

    def build(self, group: Group, *, kv_heads: int) -> AttentionBackend:
        """Return the attention backend of a layer with ``kv_heads`` heads on this tensor rank."""
        raise NotImplementedError

    def problems(self, *, heads: int, ranks: int) -> str | None:
        """Return why ``ranks`` cannot share an attention of ``heads`` heads, or None."""
        if not self.shards_heads or heads >= ranks:
            return None
        return (
            f"{type(self).__name__} gives each of {ranks} context ranks heads of its own, but an "
            f"attention has {heads} (on one tensor rank): take at most {heads} context ranks, or "
            "Ring"
        )


@dataclass(frozen=True, slots=True)
class ContextRanks:
    """The ``ContextScope`` of a process group: its ranks share rows as ``by`` says."""

    group: Group
    by: ContextParallel

    def attention_backend(self, *, kv_heads: int) -> AttentionBackend:
        """Return the attention of a layer with ``kv_heads`` heads on this tensor rank."""
        return self.by.build(self.group, kv_heads=kv_heads)


class Ulysses(ContextParallel):
    """All-to-all of tokens for heads: each rank computes some heads of whole rows (2309.14509)."""

    shards_heads = True

    def build(self, group: Group, *, kv_heads: int) -> AttentionBackend:
        return UlyssesAttention(group, kv_heads=kv_heads)


class Ring(ContextParallel):
    """Ring attention (2310.01889): keys and values are sent from rank to rank; zigzag split.

    For more ranks than an attention has heads, and for rows whose keys do not fit on one rank.
    """

    def token_split(self) -> TokenSplit:
        return zigzag_split

    def build(self, group: Group, *, kv_heads: int) -> AttentionBackend:
        del kv_heads
        return RingAttention(group)
