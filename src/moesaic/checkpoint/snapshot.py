"""Snapshot: everything a run needs to go on, as plain values and named tensors.

Shard: what one rank holds of a tensor, as rectangular blocks of the whole.

Several ranks may hold the same block (copies). A rank may hold several blocks of a tensor (a matrix
that is cut by segments) or none.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from moesaic.core.shapes import Tensor


@dataclass(frozen=True, slots=True)
class ShardBlock:
    """One block of a tensor: ``data.shape`` long, starting at ``offset``.

    ``data`` is a view of live memory: loading writes into it in place.
    """

    offset: tuple[int, ...]
    data: Tensor


@dataclass(frozen=True, slots=True)
class Shard:
    """The blocks of a tensor that a rank holds. ``shape`` and ``dtype`` are of the whole tensor.

    Raises ValueError for a block that is of another type or reaches out of the tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: tuple[ShardBlock, ...]

    def __post_init__(self) -> None:
        for piece in self.blocks:
            if piece.data.dtype != self.dtype:
                raise ValueError(f"a piece of {piece.data.dtype} in a tensor of {self.dtype}")
            ends = [o + n for o, n in zip(piece.offset, piece.data.shape, strict=True)]
            outside = any(e > n for e, n in zip(ends, self.shape, strict=True))
            if outside or any(o < 0 for o in piece.offset):
                raise ValueError(
                    f"a piece of {list(piece.data.shape)} at {list(piece.offset)} "
                    f"reaches out of a tensor of {list(self.shape)}"
                )

    @staticmethod
    def from_tensor(tensor: Tensor) -> "Shard":
        """Return the shard of a rank that holds all of ``tensor``."""
        data = tensor.detach()
        piece = ShardBlock((0,) * data.dim(), data)
        return Shard(tuple(data.shape), data.dtype, (piece,))

    @staticmethod
    def from_block(data: Tensor, *, offset: tuple[int, ...], shape: tuple[int, ...]) -> "Shard":
        """Return the shard of a rank that holds one block of a tensor of ``shape``."""
        data = data.detach()
        return Shard(tuple(shape), data.dtype, (ShardBlock(tuple(offset), data),))


TensorOrShard = Shard | Tensor  # a plain tensor is held whole


ShardFiles = Mapping[
    str, Mapping[str, TensorOrShard]
]  # file name -> tensor name -> what this rank holds


def as_shard(tensor: TensorOrShard) -> Shard:
    """Return a plain tensor as the shard that is all of it."""
    return tensor if isinstance(tensor, Shard) else Shard.from_tensor(tensor)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state after ``step`` updates, whole.

    ``files`` maps a file name without ending (``model``, ``optimizer``, ``random``) to its named
    tensors. ``state`` is JSON-able: the config, the data position, counters. ``banks`` names the
    parameters that hold experts along their first dim, with their number. ``plan`` says how the run
    was laid out over ranks (JSON data, for people).
    """

    step: int
    files: Mapping[str, Mapping[str, Tensor]]
    state: dict[str, Any] = field(default_factory=dict)
    expert_parameters: Mapping[str, int] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RankSnapshot:
    """What one rank holds of a snapshot: shards, and tensors that every rank holds whole.

    A rank may hold nothing of a tensor or not know it at all (another stage of a pipeline has it).
    ``state``, ``banks`` and ``plan`` are alike on all ranks.
    """

    step: int
    files: ShardFiles
    state: dict[str, Any] = field(default_factory=dict)
    expert_parameters: Mapping[str, int] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
