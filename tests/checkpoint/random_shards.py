"""Random shardings: tensors split into random blocks on random ranks, some replicated."""

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, product

import torch

from moesaic.checkpoint.snapshot import Shard, ShardBlock, ShardFiles, as_shard
from moesaic.core.shapes import Tensor

FullTensors = Mapping[str, Mapping[str, Tensor]]  # file -> name -> tensor


def random_shards(
    full_tensors: FullTensors,
    *,
    seed: int,
    rank: int,
    world_size: int,
    expert_tensors: Mapping[str, int] | None = None,
) -> dict[str, dict[str, Shard | Tensor]]:
    """Return copies of what ``rank`` holds in the layout of ``seed``; the same call on every rank.

    Cuts are uneven, and may leave ranks with nothing or with blocks without a value. Tensors
    without a dim are on every rank. Of ``banks`` some experts are on several ranks.
    """
    draw = random.Random(seed)
    return {
        file: {
            name: _random_shard(
                tensor,
                draw=draw,
                rank=rank,
                world_size=world_size,
                is_expert=_is_expert_tensor(name, expert_tensors or {}),
            )
            for name, tensor in tensors.items()
        }
        for file, tensors in full_tensors.items()
    }


def fill_with_sentinel(files: ShardFiles) -> dict[str, dict[str, Shard | Tensor]]:
    """Fill every piece with a value that is nowhere else, so that what is not loaded shows."""
    for tensors in files.values():
        for held in tensors.values():
            for piece in as_shard(held).blocks:
                piece.data.fill_(77)
    return {file: dict(tensors) for file, tensors in files.items()}


def mismatched_tensors(files: ShardFiles, *, full_tensors: FullTensors) -> Iterator[str]:
    """Yield the name of each tensor of which a piece is not the block of the whole one."""
    for file, tensors in files.items():
        for name, held in tensors.items():
            pieces = as_shard(held).blocks
            if not all(_is_block(piece, of=full_tensors[file][name]) for piece in pieces):
                yield f"{file}/{name}"


def _is_block(piece: ShardBlock, *, of: Tensor) -> bool:
    return torch.equal(piece.data, slice_block(of, piece.offset, piece.data.shape))


def slice_block(whole: Tensor, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return the block of a tensor at ``offset``."""
    for dim, (start, length) in enumerate(zip(offset, shape, strict=True)):
        whole = whole.narrow(dim, start, length)
    return whole


def _is_expert_tensor(name: str, banks: Mapping[str, int]) -> bool:
    return name in banks or name.partition("/")[2] in banks


def _random_shard(
    tensor: Tensor, *, draw: random.Random, rank: int, world_size: int, is_expert: bool
) -> Shard | Tensor:
    if tensor.dim() == 0:
        return tensor.clone()
    sides = [_random_intervals(length, draw=draw) for length in tensor.shape]
    pieces = []
    for ends in product(*sides):
        offset, shape = tuple(a for a, _ in ends), tuple(b - a for a, b in ends)
        holders = draw.sample(range(world_size), draw.randint(1, min(2, world_size)))
        other = draw.randrange(world_size)
        if rank in holders:
            pieces.append(ShardBlock(offset, slice_block(tensor, offset, shape).clone()))
        elif is_expert and shape[0] > 1 and rank == other:
            shape = (shape[0] - 1, *shape[1:])  # all of its experts but the last, a second time
            pieces.append(ShardBlock(offset, slice_block(tensor, offset, shape).clone()))
    return Shard(tuple(tensor.shape), tensor.dtype, tuple(pieces))


def _random_intervals(length: int, *, draw: random.Random) -> list[tuple[int, int]]:
    inner = sorted(draw.randint(0, length) for _ in range(draw.randint(0, 2)))
    ends = [0, *inner, length]
    return list(pairwise(ends))
