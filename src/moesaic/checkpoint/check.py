"""Check: everything that can be wrong with a checkpoint, each thing named.

Reads a tensor, or an expert, at a time.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from moesaic.checkpoint.index import Index, Stored, gaps, read_index
from moesaic.checkpoint.manifest import problems, read_manifest
from moesaic.checkpoint.reader import Reader, reading
from moesaic.checkpoint.units import Unit, units
from moesaic.core.errors import CheckpointError
from moesaic.core.shapes import Tensor

WEIGHTS = "model"  # only here is an expert of zeros odd: one that never was chosen has no moments


@dataclass(frozen=True, slots=True)
class Finding:
    """``where`` (a file, a tensor, an expert) something is wrong, and ``what``.

    ``doubt``: it may be right (two experts alike in a model that was upcycled a step ago).
    """

    where: str
    what: str
    doubt: bool = False


def check(directory: Path) -> list[Finding]:
    """Return what is wrong: altered files, holes, overlaps, values that are not finite, experts.

    Tensors are looked at only if every file is as it was written. Raises CheckpointError if the
    manifest or the index itself cannot be read.
    """
    manifest = read_manifest(directory)
    altered = problems(directory, manifest=manifest, names=manifest.files)
    if altered:
        return [Finding(*_parted(text)) for text in altered]
    index = read_index(directory, manifest=manifest)
    found = [Finding(f"{f}/{n}", gap) for f, n, stored in index for gap in gaps(stored)]
    with reading(directory) as reader:
        found += _values(reader, index=index, trained=manifest.step > 0)
    return found


def _parted(text: str) -> tuple[str, str]:
    name, _, rest = text.partition(" ")
    return name, rest


def _values(reader: Reader, *, index: Index, trained: bool) -> Iterator[Finding]:
    for file, name, stored in index:
        if gaps(stored):
            continue
        label = f"{file}/{name}"
        try:
            yield from _of_tensor(
                reader, label=label, stored=stored, odd=trained and file == WEIGHTS
            )
        except CheckpointError as error:
            yield Finding(label, str(error))


def _of_tensor(reader: Reader, *, label: str, stored: Stored, odd: bool) -> Iterator[Finding]:
    seen: dict[bytes, str] = {}
    matrices = odd and len(stored.shape) > 2  # a bias may well be zero, or alike
    for unit in units(reader, label=label, stored=stored):
        yield from _not_finite(unit)
        if not matrices or unit.expert is None:
            continue
        if not unit.data.any():
            yield Finding(unit.label, "every value is zero", doubt=True)
            continue
        twin = seen.setdefault(_digest(unit.data), unit.label)
        if twin != unit.label:
            yield Finding(unit.label, f"the same values as {twin}", doubt=True)


def _not_finite(unit: Unit) -> Iterator[Finding]:
    if not unit.data.dtype.is_floating_point:
        return
    data = unit.data if unit.data.dtype.itemsize > 1 else unit.data.float()
    nan, infinite = int(data.isnan().sum()), int(data.isinf().sum())
    counts = [f"{n:,} {what}" for n, what in ((nan, "NaN"), (infinite, "infinite")) if n]
    if counts:
        yield Finding(unit.label, f"{' and '.join(counts)} of {data.numel():,} values")


def _digest(data: Tensor) -> bytes:
    return hashlib.sha256(data.contiguous().flatten().view(torch.uint8).numpy().data).digest()
