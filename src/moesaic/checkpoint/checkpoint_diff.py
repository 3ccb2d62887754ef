"""Diff: two checkpoints tensor by tensor, whatever form and layout each has."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from moesaic.checkpoint.block_index import BlockIndex, StoredTensor, read_index
from moesaic.checkpoint.checkpoint_directory import read_manifest
from moesaic.checkpoint.tensor_reader import LoadedTensor, TensorReader, open_reader, read_by_expert
from moesaic.core.shapes import Tensor


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """How a tensor differs. ``note`` says why it could not be compared (or is empty).

    ``largest`` is the largest absolute difference, ``relative`` the norm of the difference over the
    norm of the first; ``at`` is the expert with the largest one, where it is a bank.
    """

    name: str
    note: str = ""
    largest: float = 0.0
    relative: float = 0.0
    expert: int | None = None

    @property
    def equal(self) -> bool:
        """The two are equal, value by value (NaN equals NaN)."""
        return not self.note and self.largest == 0.0


def diff_checkpoints(first: Path, second: Path) -> Iterator[TensorDifference]:
    """Yield each tensor of either checkpoint; one tensor or expert of both is in memory at a time.

    Raises CheckpointError for a directory that is no checkpoint. Hashes are not compared.
    """
    left, right = (_by_path(_index(path)) for path in (first, second))
    with open_reader(first) as mine, open_reader(second) as theirs:
        for name in dict.fromkeys([*left, *right]):
            if name not in right:
                yield TensorDifference(name, f"not in {second}")
            elif name not in left:
                yield TensorDifference(name, f"not in {first}")
            else:
                yield _compare(name, (mine, left[name]), (theirs, right[name]))


def _index(path: Path) -> BlockIndex:
    return read_index(path, manifest=read_manifest(path))


def _by_path(index: BlockIndex) -> dict[str, StoredTensor]:
    return {f"{file}/{name}": stored for file, name, stored in index}


ReadableTensor = tuple[TensorReader, StoredTensor]


def _compare(name: str, left: ReadableTensor, right: ReadableTensor) -> TensorDifference:
    (mine, one), (theirs, other) = left, right
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        note = f"{one.dtype} {list(one.shape)} and {other.dtype} {list(other.shape)}"
        return TensorDifference(name, note)
    largest, at, square, norm = 0.0, None, 0.0, 0.0
    experts = max(one.num_experts, other.num_experts)
    pairs = zip(
        read_by_expert(mine, label=name, stored=one, num_experts=experts),
        read_by_expert(theirs, label=name, stored=other, num_experts=experts),
        strict=True,
    )
    for unit, twin in pairs:
        found = _distance(unit, twin)
        square, norm = square + found.square, norm + found.norm
        if not found.largest <= largest:  # a NaN is the largest of all
            largest, at = found.largest, unit.expert
    relative = math.sqrt(square / norm) if norm else math.copysign(math.inf, 1) if square else 0.0
    return TensorDifference(name, largest=largest, relative=relative, expert=at)


@dataclass(frozen=True, slots=True)
class _Distance:
    largest: float
    square: float
    norm: float


def _distance(unit: LoadedTensor, twin: LoadedTensor) -> _Distance:
    one, other = (_as_float64(tensor.data) for tensor in (unit, twin))
    both = one.isnan() & other.isnan()
    gap = torch.where(both | (one == other), 0.0, (one - other).abs())
    largest = float(gap.max()) if gap.numel() else 0.0
    return _Distance(largest, float(gap.square().sum()), float(one.square().sum()))


def _as_float64(data: Tensor) -> Tensor:
    return data.to(torch.float64)
