"""Integrity check of a checkpoint: altered files, gaps, overlaps, non-finite values, suspect
experts.

Reads one tensor, or expert, at a time.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from moesaic.checkpoint.block_index import (
    BlockIndex,
    StoredTensor,
    coverage_problems,
    read_index,
)
from moesaic.checkpoint.manifest import file_problems, read_manifest
from moesaic.checkpoint.stored_weights import index_of_file
from moesaic.checkpoint.tensor_reader import LoadedTensor, TensorReader, open_reader, read_by_expert
from moesaic.core.errors import CheckpointError
from moesaic.core.shapes import Tensor

WEIGHTS_FILE = "model"  # optimizer state of an expert that was never selected may be zero


@dataclass(frozen=True, slots=True)
class IntegrityProblem:
    """A problem at a ``location``: a file, a tensor or an expert.

    ``uncertain``: it may be intended (equal experts in a model that was just upcycled).
    """

    location: str
    message: str
    uncertain: bool = False


def check_checkpoint(directory: Path) -> list[IntegrityProblem]:
    """Return every problem of a checkpoint.

    Tensors are read only if no file is altered. Raises CheckpointError if the manifest or the index
    cannot be read.
    """
    manifest = read_manifest(directory)
    altered = file_problems(directory, manifest=manifest, names=manifest.files)
    if altered:
        parts = (text.partition(" ") for text in altered)
        return [IntegrityProblem(name, message) for name, _, message in parts]
    index = read_index(directory, manifest=manifest)
    problems = [
        IntegrityProblem(f"{f}/{n}", problem)
        for f, n, stored in index
        for problem in coverage_problems(stored)
    ]
    with open_reader(directory) as reader:
        problems += _check_tensors(reader, index=index, trained=manifest.step > 0)
    return problems


def check_exported_weights(path: Path) -> list[IntegrityProblem]:
    """Return the problems of a ``model.safetensors``: damaged, or values that are not finite."""
    try:
        tensors = index_of_file(path)
    except CheckpointError as error:
        return [IntegrityProblem(path.name, str(error))]
    problems: list[IntegrityProblem] = []
    with open_reader(path.parent) as reader:
        for name, stored in tensors.items():
            tensor = LoadedTensor(f"{path.name}/{name}", reader.read_tensor(stored))
            problems += _check_finite(tensor)
    return problems


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
    matrices = compare_experts and len(stored.shape) > 2  # biases may be zero or equal
    for tensor in read_by_expert(reader, label=label, stored=stored):
        yield from _check_finite(tensor)
        if not matrices or tensor.expert is None:
            continue
        if not tensor.data.any():
            yield IntegrityProblem(tensor.label, "every value is zero", uncertain=True)
            continue
        first = seen.setdefault(_digest(tensor.data), tensor.label)
        if first != tensor.label:
            yield IntegrityProblem(tensor.label, f"the same values as {first}", uncertain=True)


def _check_finite(tensor: LoadedTensor) -> Iterator[IntegrityProblem]:
    if not tensor.data.dtype.is_floating_point:
        return
    data = tensor.data if tensor.data.dtype.itemsize > 1 else tensor.data.float()
    nan, infinite = int(data.isnan().sum()), int(data.isinf().sum())
    counts = [f"{n:,} {what}" for n, what in ((nan, "NaN"), (infinite, "infinite")) if n]
    if counts:
        yield IntegrityProblem(tensor.label, f"{' and '.join(counts)} of {data.numel():,} values")


def _digest(data: Tensor) -> bytes:
    return hashlib.sha256(data.contiguous().flatten().view(torch.uint8).numpy().data).digest()
