"""Slices: a rank's part of a tensor, taken from the whole and described as blocks of it."""

from collections.abc import Mapping, Sequence
from itertools import product

import torch

from moesaic.checkpoint.shard import ShardBlock, Shard
from moesaic.core.shapes import Shaped, Tensor
from moesaic.dist.plan import RankGrid
from moesaic.parallel.layout import Placement

Spans = tuple[tuple[int, int], ...]  # (start, length) of runs of a dim that are held side by side


def local_spans(placement: Placement, *, grid: RankGrid, place: Mapping[str, int]) -> tuple[Spans, ...]:
    """Return what the rank at ``place`` holds of each dim of a parameter."""
    found: list[Spans] = [((0, size),) for size in placement.shape]
    for cut in placement.sharded_dims:
        found[cut.dim] = cut.spans(place[cut.axis], grid.axes[cut.axis])
    return tuple(found)


def slice_local(whole: Shaped[Tensor, "*N"], held: Sequence[Spans]) -> Shaped[Tensor, "*n"]:
    """Return a rank's part of a whole tensor, contiguous; the tensor itself if that is all."""
    part = whole
    for dim, runs in enumerate(held):
        if sum(length for _, length in runs) < whole.shape[dim]:
            part = torch.cat([part.narrow(dim, *run) for run in runs or [(0, 0)]], dim)
    return part.contiguous()


def clip_spans(held: Sequence[Spans], *, dim: int, start: int, length: int) -> tuple[Spans, ...]:
    """Return what is left of a part when only ``length`` rows of its ``dim`` are kept."""
    kept, at = [], 0
    for first, size in held[dim]:
        low, high = max(start, at), min(start + length, at + size)
        if high > low:
            kept.append((first + low - at, high - low))
        at += size
    return (*held[:dim], tuple(kept), *held[dim + 1 :])


def describe_shard(part: Shaped[Tensor, "*n"], held: Sequence[Spans], *, shape: Sequence[int]) -> Shard:
    """Describe a part in memory as blocks of the whole of ``shape``."""
    pieces = []
    for runs in product(*(_local_offsets(spans_) for spans_ in held)):
        block = part.detach()
        for dim, (_, here, length) in enumerate(runs):
            block = block.narrow(dim, here, length)
        pieces.append(ShardBlock(tuple(start for start, _, _ in runs), block))
    return Shard(tuple(shape), part.dtype, tuple(pieces))


def write_shard(whole: Shaped[Tensor, "*N"], found: Shard) -> None:
    """Write a rank's blocks into a whole tensor."""
    for piece in found.blocks:
        target = whole
        for dim, (start, length) in enumerate(zip(piece.offset, piece.data.shape, strict=True)):
            target = target.narrow(dim, start, length)
        target.copy_(piece.data)


def _local_offsets(held: Spans) -> list[tuple[int, int, int]]:
    """Return (start in the whole, start in the part, length) of each run."""
    found, at = [], 0
    for start, length in held:
        found.append((start, at, length))
        at += length
    return found
