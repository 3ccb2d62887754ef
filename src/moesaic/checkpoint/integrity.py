"""Check: everything that can be wrong with a checkpoint, each thing named.

Reads a tensor, or an expert, at a time.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from moesaic.checkpoint.block_index import BlockIndex, StoredTensor, coverage_problems, read_index
from moesaic.checkpoint.checkpoint_directory import file_problems, read_manifest
from moesaic.checkpoint.tensor_reader import LoadedTensor, TensorReader, open_reader, read_by_expert
from moesaic.core.errors import CheckpointError
from moesaic.core.shapes import Tensor

WEIGHTS_FILE = (
    "model"  # only here is an expert of zeros odd: one that never was chosen has no moments
)


@dataclass(frozen=True, slots=True)
class IntegrityProblem:
    """``where`` (a file, a tensor, an expert) something is wrong, and ``what``.

    ``uncertain``: it may be right (two experts alike in a model that was upcycled a step ago).
    """

    location: str
    message: str
    uncertain: bool = False


def check_checkpoint(directory: Path) -> list[IntegrityProblem]:
    """Return what is wrong: altered files, holes, overlaps, values that are not finite, experts.

    Tensors are looked at only if every file is as it was written. Raises CheckpointError if the
    manifest or the index itself cannot be read.
    """
    manifest = read_manifest(directory)
    altered = file_problems(directory, manifest=manifest, names=manifest.files)
    if altered:
        return [IntegrityProblem(*_split_first_word(text)) for text in altered]
    index = read_index(directory, manifest=manifest)
    found = [
        IntegrityProblem(f"{f}/{n}", gap)
        for f, n, stored in index
        for gap in coverage_problems(stored)
    ]
    with open_reader(directory) as reader:
        found += _check_tensors(reader, index=index, trained=manifest.step > 0)
    return found


def _split_first_word(text: str) -> tuple[str, str]:
    name, _, rest = text.partition(" ")
    return name, rest


def _check_tensors(
    reader: TensorReader, *, index: BlockIndex, trained: bool
) -> Iterator[IntegrityProblem]:
    for file, name, stored in index:
        if coverage_problems(stored):
            continue
        label = f"{file}/{name}"
        try:
            yield from _check_tensor(
                reader, label=label, stored=stored, compare_experts=trained and file == WEIGHTS_FILE
            )
        except CheckpointError as error:
            yield IntegrityProblem(label, str(error))


def _check_tensor(
    reader: TensorReader, *, label: str, stored: StoredTensor, compare_experts: bool
) -> Iterator[IntegrityProblem]:
    seen: dict[bytes, str] = {}
    matrices = compare_experts and len(stored.shape) > 2  # a bias may well be zero, or alike
    for unit in read_by_expert(reader, label=label, stored=stored):
        yield from _check_finite(unit)
        if not matrices or unit.expert is None:
            continue
        if not unit.data.any():
            yield IntegrityProblem(unit.label, "every value is zero", uncertain=True)
            continue
        twin = seen.setdefault(_digest(unit.data), unit.label)
        if twin != unit.label:
            yield IntegrityProblem(unit.label, f"the same values as {twin}", uncertain=True)


def _check_finite(unit: LoadedTensor) -> Iterator[IntegrityProblem]:
    if not unit.data.dtype.is_floating_point:
        return
    data = unit.data if unit.data.dtype.itemsize > 1 else unit.data.float()
    nan, infinite = int(data.isnan().sum()), int(data.isinf().sum())
    counts = [f"{n:,} {what}" for n, what in ((nan, "NaN"), (infinite, "infinite")) if n]
    if counts:
        yield IntegrityProblem(unit.label, f"{' and '.join(counts)} of {data.numel():,} values")


def _digest(data: Tensor) -> bytes:
    return hashlib.sha256(data.contiguous().flatten().view(torch.uint8).numpy().data).digest()
