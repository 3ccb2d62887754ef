"""Snapshot: the complete state of a run, as JSON values and named tensors; and its shards per rank.

A shard is the part of a tensor on one rank: rectangular blocks of the full tensor. Several ranks
may hold the same block (replicas). A rank may hold several blocks of a tensor (a matrix that is
split in segments) or none.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import torch

from moesaic.core.shapes import Tensor


@dataclass(frozen=True, slots=True)
class ShardBlock:
    """A block of a tensor: ``data``, at ``offset`` of the full tensor.

    ``data`` is a view of the parameter: loading writes into it in place.
    """

    offset: tuple[int, ...]
    data: Tensor


@dataclass(frozen=True, slots=True)
class Shard:
    """The blocks of a tensor on a rank. ``shape`` and ``dtype`` are those of the full tensor.

    Raises ValueError for a block of another dtype or outside of the tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: tuple[ShardBlock, ...]

    def __post_init__(self) -> None:
        for block in self.blocks:
            if block.data.dtype != self.dtype:
                raise ValueError(f"a block of {block.data.dtype} in a tensor of {self.dtype}")
            ends = [o + n for o, n in zip(block.offset, block.data.shape, strict=True)]
            outside = any(e > n for e, n in zip(ends, self.shape, strict=True))
            if outside or any(o < 0 for o in block.offset):
                raise ValueError(
                    f"a block of {list(block.data.shape)} at {list(block.offset)} "
                    f"is outside of a tensor of {list(self.shape)}"
                )

    @staticmethod
    def from_tensor(tensor: Tensor) -> "Shard":
        """Return the shard of a rank with the full tensor."""
        data = tensor.detach()
        return Shard.from_block(data, offset=(0,) * data.dim(), shape=tuple(data.shape))

    @staticmethod
    def from_block(data: Tensor, *, offset: tuple[int, ...], shape: tuple[int, ...]) -> "Shard":
        """Return the shard of a rank with one block of a tensor of ``shape``."""
        data = data.detach()
        return Shard(tuple(shape), data.dtype, (ShardBlock(tuple(offset), data),))


TensorOrShard = Shard | Tensor  # a tensor: the rank has all of it
ShardFiles = Mapping[str, Mapping[str, TensorOrShard]]  # by file name and tensor name


def as_shard(tensor: TensorOrShard) -> Shard:
    """Return a tensor as the shard of a rank with all of it."""
    return tensor if isinstance(tensor, Shard) else Shard.from_tensor(tensor)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The complete state after ``step`` updates.

    ``files`` maps a file name without ending (``model``, ``optimizer``, ``random``) to its named
    tensors. ``state`` is JSON: the config, the data position, counters. ``expert_parameters`` maps
    the parameters whose first dim is experts to the number of experts. ``plan`` is the parallel
    plan (JSON, informational).
    """

    step: int
    files: Mapping[str, Mapping[str, Tensor]]
    state: dict[str, Any] = field(default_factory=dict)
    expert_parameters: Mapping[str, int] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RankSnapshot:
    """The part of a snapshot on one rank: shards, and tensors that are replicated on every rank.

    Tensors of other pipeline stages are absent. ``state``, ``expert_parameters`` and ``plan`` are
    the same on all ranks. ``frozen`` are files and tensors in them that no later step changes.
    """

    step: int
    files: ShardFiles
    state: dict[str, Any] = field(default_factory=dict)
    expert_parameters: Mapping[str, int] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    frozen: Set[tuple[str, str]] = frozenset()
