"""Diff: two checkpoints tensor by tensor, whatever form and layout each has."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from moesaic.checkpoint.index import Index, Stored, read_index
from moesaic.checkpoint.manifest import read_manifest
from moesaic.checkpoint.reader import Reader, reading
from moesaic.checkpoint.units import Unit, units
from moesaic.core.shapes import Tensor


@dataclass(frozen=True, slots=True)
class Difference:
    """How a tensor differs. ``note`` says why it could not be compared (or is empty).

    ``largest`` is the largest absolute difference, ``relative`` the norm of the difference over the
    norm of the first; ``at`` is the expert with the largest one, where it is a bank.
    """

    name: str
    note: str = ""
    largest: float = 0.0
    relative: float = 0.0
    at: int | None = None

    @property
    def same(self) -> bool:
        """The two are equal, value by value (NaN equals NaN)."""
        return not self.note and self.largest == 0.0


def diff(one: Path, other: Path) -> Iterator[Difference]:
    """Yield each tensor of either checkpoint; one tensor or expert of both is in memory at a time.

    Raises CheckpointError for a directory that is no checkpoint. Hashes are not compared.
    """
    left, right = (_named(_index(path)) for path in (one, other))
    with reading(one) as mine, reading(other) as theirs:
        for name in dict.fromkeys([*left, *right]):
            if name not in right:
                yield Difference(name, f"not in {other}")
            elif name not in left:
                yield Difference(name, f"not in {one}")
            else:
                yield _compare(name, (mine, left[name]), (theirs, right[name]))


def _index(path: Path) -> Index:
    return read_index(path, manifest=read_manifest(path))


def _named(index: Index) -> dict[str, Stored]:
    return {f"{file}/{name}": stored for file, name, stored in index}


Side = tuple[Reader, Stored]


def _compare(name: str, left: Side, right: Side) -> Difference:
    (mine, one), (theirs, other) = left, right
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        note = f"{one.dtype} {list(one.shape)} and {other.dtype} {list(other.shape)}"
        return Difference(name, note)
    largest, at, square, norm = 0.0, None, 0.0, 0.0
    experts = max(one.experts, other.experts)
    pairs = zip(
        units(mine, label=name, stored=one, experts=experts),
        units(theirs, label=name, stored=other, experts=experts),
        strict=True,
    )
    for unit, twin in pairs:
        found = _distance(unit, twin)
        square, norm = square + found.square, norm + found.norm
        if not found.largest <= largest:  # a NaN is the largest of all
            largest, at = found.largest, unit.expert
    relative = math.sqrt(square / norm) if norm else math.copysign(math.inf, 1) if square else 0.0
    return Difference(name, largest=largest, relative=relative, at=at)


@dataclass(frozen=True, slots=True)
class _Distance:
    largest: float
    square: float
    norm: float


def _distance(unit: Unit, twin: Unit) -> _Distance:
    one, other = (_wide(tensor.data) for tensor in (unit, twin))
    both = one.isnan() & other.isnan()
    gap = torch.where(both | (one == other), 0.0, (one - other).abs())
    largest = float(gap.max()) if gap.numel() else 0.0
    return _Distance(largest, float(gap.square().sum()), float(one.square().sum()))


def _wide(data: Tensor) -> Tensor:
    return data.to(torch.float64)
