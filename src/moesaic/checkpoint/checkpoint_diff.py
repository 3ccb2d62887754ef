"""Checkpoint diff: compare two checkpoints tensor by tensor, whatever their form and plan."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from moesaic.checkpoint.block_index import StoredTensor, read_index
from moesaic.checkpoint.manifest import read_manifest
from moesaic.checkpoint.tensor_reader import TensorReader, open_reader, read_by_expert
from moesaic.core.shapes import Tensor


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """How a tensor differs. ``note`` is why it cannot be compared, or empty.

    ``largest`` is the largest absolute difference, ``relative`` the norm of the difference over the
    norm of the first; ``expert`` is the expert with the largest difference, if there are experts.
    """

    name: str
    note: str = ""
    largest: float = 0.0
    relative: float = 0.0
    expert: int | None = None

    @property
    def equal(self) -> bool:
        """Whether all values are equal (NaN equals NaN)."""
        return not self.note and self.largest == 0.0


def diff_checkpoints(first: Path, second: Path) -> Iterator[TensorDifference]:
    """Yield each tensor of either checkpoint; one tensor or expert of both is in memory at a time.

    Raises CheckpointError for a directory that is no checkpoint. Hashes are not checked.
    """
    left, right = (_tensors_by_path(path) for path in (first, second))
    with open_reader(first) as left_reader, open_reader(second) as right_reader:
        for name in dict.fromkeys([*left, *right]):
            if name not in right:
                yield TensorDifference(name, f"not in {second}")
            elif name not in left:
                yield TensorDifference(name, f"not in {first}")
            else:
                yield _compare(name, (left_reader, left[name]), (right_reader, right[name]))


def _tensors_by_path(path: Path) -> dict[str, StoredTensor]:
    index = read_index(path, manifest=read_manifest(path))
    return {f"{file}/{name}": stored for file, name, stored in index}


ReadableTensor = tuple[TensorReader, StoredTensor]


def _compare(name: str, left: ReadableTensor, right: ReadableTensor) -> TensorDifference:
    (left_reader, one), (right_reader, other) = left, right
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        note = f"{one.dtype} {list(one.shape)} and {other.dtype} {list(other.shape)}"
        return TensorDifference(name, note)
    largest, expert, square, norm = 0.0, None, 0.0, 0.0
    experts = max(one.num_experts, other.num_experts)
    pairs = zip(
        read_by_expert(left_reader, label=name, stored=one, num_experts=experts),
        read_by_expert(right_reader, label=name, stored=other, num_experts=experts),
        strict=True,
    )
    for ours, theirs in pairs:
        found = _distance(ours.data, theirs.data)
        square, norm = square + found.square, norm + found.norm
        if not found.largest <= largest:  # NaN counts as the largest
            largest, expert = found.largest, ours.expert
    relative = math.sqrt(square / norm) if norm else math.copysign(math.inf, 1) if square else 0.0
    return TensorDifference(name, largest=largest, relative=relative, expert=expert)


@dataclass(frozen=True, slots=True)
class _Distance:
    largest: float
    square: float
    norm: float


def _distance(first: Tensor, second: Tensor) -> _Distance:
    one, other = first.to(torch.float64), second.to(torch.float64)
    both = one.isnan() & other.isnan()
    gap = torch.where(both | (one == other), 0.0, (one - other).abs())
    largest = float(gap.max()) if gap.numel() else 0.0
    return _Distance(largest, float(gap.square().sum()), float(one.square().sum()))
