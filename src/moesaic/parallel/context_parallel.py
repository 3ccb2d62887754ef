"""Deal: which tokens of a batch each rank holds.

All ranks that share the rows see the whole batch of ids, and each keeps its slice of the packed
stream. Everything outside attention is token by token, so any slices would do; the cut decides how
evenly the work of attention is spread.

Letters: T tokens, P parts, n ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch

from moesaic.core.config import Choice
from moesaic.core.shapes import Int, Tensor
from moesaic.distributed.process_groups import Group
from moesaic.nn.attention_backend import AttentionBackend
from moesaic.nn.packing import Packing, TokenPartition, TokenSpan
from moesaic.parallel.ring_attention import RingAttention
from moesaic.parallel.ulysses_attention import UlyssesAttention

MAX_RUN_LENGTH = 1024


TokenSplit = Callable[[int, int], list[list[range]]]


def contiguous_split(tokens: int, parts: int) -> list[list[range]]:
    """Cut a stream into one run for each part, the first ones a token longer."""
    return [[run] for run in _consecutive_ranges(even_sizes(tokens, parts))]


def zigzag_split(tokens: int, parts: int) -> list[list[range]]:
    """Cut a stream into two runs for each part, one from each end.

    In causal attention late tokens look at more than early ones: over one long row every part then
    has the same work (2311.09431 shows why the plain cut has not, and deals token by token; runs
    from both ends do as well and keep neighbours together).
    """
    runs = _consecutive_ranges(even_sizes(tokens, 2 * parts))
    return [[runs[part], runs[-1 - part]] for part in range(parts)]


@dataclass(frozen=True, slots=True)
class SequenceSharder:
    """``rank`` is this process's place among ``ranks`` that share a batch's rows.

    ``lanes`` neighbouring ranks make one part (``TokenPartition``); within it they hold neighbouring
    tokens. A rank may hold none. Called once per stream and batch; it waits for the device, as
    making a ``Packing`` does.
    """

    rank: int
    ranks: int
    tensor_ranks: int = 1
    token_split: TokenSplit = contiguous_split

    def __call__(self, packing: Packing) -> Packing:
        if self.ranks == 1:
            return packing
        parts = self.token_split(packing.num_tokens, self.ranks // self.tensor_ranks)
        held = [sum(map(len, runs)) for runs in parts]
        division = TokenPartition(
            sizes=tuple(size for tokens in held for size in even_sizes(tokens, self.tensor_ranks)),
            rank=self.rank,
            tensor_ranks=self.tensor_ranks,
        )
        if len(parts) > 1:
            order = _permutation([run for runs in parts for run in runs], like=packing.index)
            if order is not None:
                packing = replace(
                    packing,
                    index=packing.index[order],
                    row=packing.row[order],
                    position=packing.position[order],
                    ordered=False,
                )
        return replace(packing, partition=replace(division, spans=_runs_of_parts(packing, held)))


def even_sizes(tokens: int, parts: int) -> list[int]:
    """Return the sizes of parts that are as even as can be, larger ones first."""
    size, rest = divmod(tokens, parts)
    return [size + (part < rest) for part in range(parts)]


def _consecutive_ranges(sizes: Sequence[int]) -> list[range]:
    return [range(start, stop) for start, stop in pairwise(accumulate(sizes, initial=0))]


def _permutation(runs: Sequence[range], *, like: Int[Tensor, "T"]) -> Int[Tensor, "T"] | None:
    """Return the tokens in the order of the runs; None where that is the order they have."""
    if all(one.stop == next_.start for one, next_ in pairwise(runs)):
        return None
    return torch.cat([torch.arange(r.start, r.stop, device=like.device) for r in runs])


def _runs_of_parts(packing: Packing, held: Sequence[int]) -> tuple[tuple[TokenSpan, ...], ...]:
    """Return each part's runs of tokens that are neighbours in one row, none over ``MAX_RUN_LENGTH``."""
    row, position = packing.row, packing.position
    new = (row.diff() != 0) | (position.diff() != 1)
    first = torch.cat([new.new_ones(min(1, len(row))), new]).nonzero()[:, 0]
    starts, rows, positions = torch.stack([first, row[first], position[first]]).tolist()
    ends = [*starts[1:], packing.num_tokens]
    whole = list(zip(map(range, starts, ends), rows, positions, strict=True))
    return tuple(_clip_runs(span, whole) for span in _consecutive_ranges(held))


def _clip_runs(span: range, whole: Sequence[tuple[range, int, int]]) -> tuple[TokenSpan, ...]:
    """Cut the runs of a stream to a part of it, and into pieces."""
    return tuple(
        TokenSpan(
            row, position + first - run.start, first - span.start, min(MAX_RUN_LENGTH, stop - first)
        )
        for run, row, position in whole
        for stop in [min(run.stop, span.stop)]
        for first in range(max(run.start, span.start), stop, MAX_RUN_LENGTH)
    )


class ContextParallel(Choice):
    """Family: how tokens look at those of their row that other ranks hold (context parallelism)."""

    def token_split(self) -> TokenSplit:
        """Return how a stream is cut into parts."""
        return contiguous_split

    def build(self, group: Group, *, kv_heads: int) -> AttentionBackend:
        """Return the part of an attention with so many key/value heads on this rank."""
        raise NotImplementedError

    def problems(self, *, heads: int, ranks: int) -> str | None:
        """Return why so many ranks cannot share an attention of ``heads`` heads, if they cannot."""
        del heads, ranks
        return None


class Ulysses(ContextParallel):
    """Tokens are exchanged for heads: each rank sees whole rows, of some heads (2309.14509)."""

    def build(self, group: Group, *, kv_heads: int) -> AttentionBackend:
        return UlyssesAttention(group, kv_heads=kv_heads)

    def problems(self, *, heads: int, ranks: int) -> str | None:
        return UlyssesAttention.problems(heads=heads, ranks=ranks)


class Ring(ContextParallel):
    """Keys and values go round (2310.01889); tokens are dealt from both ends of the stream.

    For more ranks than an attention has heads, and for rows whose keys are too many for one rank.
    """

    def token_split(self) -> TokenSplit:
        return zigzag_split

    def build(self, group: Group, *, kv_heads: int) -> AttentionBackend:
        del kv_heads
        return RingAttention(group)
