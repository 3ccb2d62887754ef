"""Block index: which file stores each block of each tensor, for both forms of a checkpoint.

The full form has a file per kind (``model.safetensors``), with each tensor in one block. The
sharded form has a file per rank (``shard-00003.safetensors``) and an ``index.json``: tensors as the
blocks of the ranks' shards, but every expert stored separately under its global number:
``model/encoder.0.experts.up/expert-0007``. A block that does not span its tensor or expert has its
offset after an ``@``.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field

from moesaic.checkpoint.manifest import MAX_EXPERTS, Manifest
from moesaic.checkpoint.safetensors_io import DTYPE_NAMES, MAX_DIMS, read_header
from moesaic.core.config_errors import show_value
from moesaic.core.config_upgrade import current_name
from moesaic.core.errors import CheckpointError, printable
from moesaic.core.file_reader import MAX_INT, MIB, Count, FileKind, FileShape
from moesaic.core.units import show_bytes

INDEX_FILE = "index.json"
INDEX_FORMAT = 1
INDEX_KIND = FileKind(
    name="index of a checkpoint",
    max_bytes=512 * MIB,
    max_values=20_000_000,
    error=CheckpointError,
)
MAX_SHOWN_PROBLEMS = 4
MAX_COMPARISONS = 4_000_000  # of pairs of blocks; 4,096 ranks in a grid need a tenth
DTYPE_BY_NAME = {name: dtype for dtype, name in DTYPE_NAMES.items()}
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A block of a tensor: ``shape`` values at ``offset``, stored in ``file`` under ``key``."""

    file: str
    key: str
    offset: Shape
    shape: Shape

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint. ``num_experts``: the length of its first dim if that is experts, or
    0.

    ``split_by_expert``: each expert is stored separately, without the first dim.
    """

    shape: Shape
    dtype: torch.dtype
    blocks: tuple[StoredBlock, ...]
    num_experts: int = 0
    split_by_expert: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def expert_blocks(self, expert: int) -> tuple[StoredBlock, ...]:
        """The blocks of one expert of a tensor that is split by expert."""
        return tuple(b for b in self.blocks if b.offset[0] == expert)


@dataclass(frozen=True, slots=True)
class BlockIndex:
    """``files``: stored tensors by kind of file (``model``, ``optimizer``) and name."""

    files: Mapping[str, Mapping[str, StoredTensor]]

    def __iter__(self) -> Iterator[tuple[str, str, StoredTensor]]:
        for file, tensors in self.files.items():
            for name, stored in tensors.items():
                yield file, name, stored

    def problems(self) -> list[str]:
        """Return a message on tensors that their blocks do not cover, or nothing."""
        problems = [f"{file}/{name}: {p}" for file, name, t in self for p in coverage_problems(t)]
        return [first_few(problems)] if problems else []

    def to_json(self) -> str:
        """Return the content of ``index.json``: a line for each tensor."""
        lines = [
            f" {json.dumps([file, name], ensure_ascii=False)[1:-1]}, {_tensor_json(stored)}"
            for file, name, stored in self
        ]
        body = ",\n".join(f" [{line.strip()}]" for line in lines)
        return f'{{"format": {INDEX_FORMAT}, "tensors": [\n{body}\n]}}\n'


def num_experts_of(name: str, *, shape: Shape, expert_parameters: Mapping[str, int]) -> int:
    """Return the number of experts along the first dim of a tensor; 0 if it is not experts.

    ``name`` is that of a parameter, or of its optimizer state (``exp_avg/...``).
    """
    parameter = name if name in expert_parameters else name.partition("/")[2]
    experts = expert_parameters.get(parameter, 0)
    return experts if shape[:1] == (experts,) and math.prod(shape) else 0


def sharded_tensor(
    name: str,
    *,
    shape: Shape,
    dtype: torch.dtype,
    blocks: Iterable[StoredBlock],
    expert_parameters: Mapping[str, int],
) -> StoredTensor:
    """Return a tensor of the sharded form: split by expert if its first dim is experts."""
    experts = num_experts_of(name, shape=shape, expert_parameters=expert_parameters)
    return StoredTensor(shape, dtype, tuple(blocks), experts, split_by_expert=experts > 0)


def block_key(path: str, *, block: tuple[Shape, Shape], shape: Shape, split: bool) -> str:
    """Return the key of a block (offset and shape) of the tensor ``path`` in a shard file."""
    offset, size = block
    if split:
        path = expert_label(path, offset[0])
        offset, size, shape = offset[1:], size[1:], shape[1:]
    return path if size == shape else f"{path}@{','.join(str(o) for o in offset)}"


def expert_label(label: str, expert: int) -> str:
    """Return the name of an expert of a tensor in files and messages."""
    return f"{label}/expert-{expert:04d}"


class _TensorShape(FileShape):
    dtype: str
    shape: tuple[Count, ...] = Field(max_length=MAX_DIMS)
    experts: int = Field(ge=0, le=MAX_EXPERTS)
    split: bool
    blocks: tuple[tuple[str, tuple[Count, ...], tuple[Count, ...]], ...]


class _IndexShape(FileShape):
    kind: ClassVar[FileKind] = INDEX_KIND
    format: Literal[1]  # INDEX_FORMAT
    tensors: tuple[tuple[str, str, _TensorShape], ...]


def read_index(directory: Path, *, manifest: Manifest) -> BlockIndex:
    """Return the index of a checkpoint of either form. Raises CheckpointError if it is damaged."""
    if INDEX_FILE in manifest.files:
        index = _parse_sharded(directory, manifest=manifest)
    else:
        index = _read_full(directory, manifest=manifest)
    return BlockIndex(
        {
            file: {current_name(n, file_format=manifest.format): t for n, t in held.items()}
            for file, held in index.files.items()
        }
    )


def _parse_sharded(directory: Path, *, manifest: Manifest) -> BlockIndex:
    path = directory / INDEX_FILE
    files: dict[str, dict[str, StoredTensor]] = {}
    used: Counter[str] = Counter()
    for file, name, plain in _IndexShape.read(path).tensors:
        label = f"{file}/{name}"
        if problem := _tensor_problem(plain, manifest=manifest):
            raise INDEX_KIND.problem(path, f"{printable(label)}: {problem}")
        blocks = tuple(
            StoredBlock(
                stored_in,
                block_key(label, block=(offset, size), shape=plain.shape, split=plain.split),
                offset,
                size,
            )
            for stored_in, offset, size in plain.blocks
        )
        stored = StoredTensor(
            plain.shape, DTYPE_BY_NAME[plain.dtype], blocks, plain.experts, plain.split
        )
        for block in blocks:
            used[block.file] += block.numel * stored.dtype.itemsize
        files.setdefault(file, {})[name] = stored
    for stored_in, claimed in used.items():  # before any tensor is allocated
        found = (directory / stored_in).stat().st_size if (directory / stored_in).is_file() else 0
        if claimed > found:
            found_text = f"{show_bytes(claimed)} of tensors in {stored_in}"
            raise INDEX_KIND.problem(path, f"{found_text}, which has {show_bytes(found)}")
    return BlockIndex(files)


def _tensor_problem(plain: _TensorShape, *, manifest: Manifest) -> str:
    """Return what cannot be true of a tensor, or nothing; overlaps and gaps are found later."""
    if plain.dtype not in DTYPE_BY_NAME:
        return f"dtype {show_value(plain.dtype)}, expected one of {', '.join(DTYPE_BY_NAME)}"
    if math.prod(plain.shape) * 8 > MAX_INT:
        return f"shape {show_value(list(plain.shape))} has more values than 64 bits can count"
    if (plain.experts or plain.split) and plain.shape[:1] != (plain.experts,):
        return f"{plain.experts} experts in the shape {show_value(list(plain.shape))}"
    for file, offset, size in plain.blocks:
        if file not in manifest.files:
            return f"a block in {show_value(file)}, which is not in the manifest"
        if not len(offset) == len(size) == len(plain.shape):
            found = f"{list(size)} at {list(offset)}"
            return f"a block {found}, expected {len(plain.shape)} dimensions"
        if plain.split and size[0] != 1:
            return f"a block {list(size)} at {list(offset)} is not of one expert"
    return ""


def _read_full(directory: Path, *, manifest: Manifest) -> BlockIndex:
    files: dict[str, dict[str, StoredTensor]] = {}
    for file in sorted(n for n in manifest.files if n.endswith(".safetensors")):
        tensors = files.setdefault(file.removesuffix(".safetensors"), {})
        for name, entry in read_header(directory / file).tensors.items():
            block = StoredBlock(file, name, (0,) * len(entry.shape), entry.shape)
            experts = num_experts_of(
                current_name(name, file_format=manifest.format),
                shape=entry.shape,
                expert_parameters=manifest.expert_parameters,
            )
            tensors[name] = StoredTensor(entry.shape, DTYPE_BY_NAME[entry.dtype], (block,), experts)
    return BlockIndex(files)


def _tensor_json(stored: StoredTensor) -> str:
    value = {
        "dtype": DTYPE_NAMES[stored.dtype],
        "shape": stored.shape,
        "experts": stored.num_experts,
        "split": stored.split_by_expert,
        "blocks": [(b.file, b.offset, b.shape) for b in stored.blocks],
    }
    return json.dumps(value)


def overlapping_blocks(blocks: Iterable[StoredBlock]) -> Iterator[tuple[StoredBlock, StoredBlock]]:
    """Yield each pair of overlapping blocks, by a sweep along the dim with most offsets."""
    blocks = [block for block in blocks if block.numel]
    if not blocks or not blocks[0].shape:
        yield from ((blocks[0], other) for other in blocks[1:])
        return
    offsets = [{block.offset[dim] for block in blocks} for dim in range(len(blocks[0].shape))]
    dim = max(range(len(offsets)), key=lambda d: len(offsets[d]))
    active: list[StoredBlock] = []
    comparisons = 0
    for block in sorted(blocks, key=lambda b: b.offset[dim]):
        active = [b for b in active if b.offset[dim] + b.shape[dim] > block.offset[dim]]
        comparisons += len(active)
        if comparisons > MAX_COMPARISONS:
            raise CheckpointError(f"{len(blocks):,} blocks of a tensor are cut too irregularly")
        yield from ((other, block) for other in active if _intersect(other, block))
        active.append(block)


def _intersect(one: StoredBlock, other: StoredBlock) -> bool:
    sides = zip(one.offset, one.shape, other.offset, other.shape, strict=True)
    return all(a < b + m and b < a + n for a, n, b, m in sides)


def coverage_problems(stored: StoredTensor) -> list[str]:
    """Return overlaps, gaps and missing experts of the blocks of a tensor."""
    problems = [
        f"{_describe_block(one)} of {one.file} and {_describe_block(other)} of {other.file} overlap"
        for one, other in islice(overlapping_blocks(stored.blocks), MAX_SHOWN_PROBLEMS + 1)
    ]
    outside = [b for b in stored.blocks if not is_inside(b, shape=stored.shape)]
    problems += [
        f"{_describe_block(b)} of {b.file} is outside of {list(stored.shape)}" for b in outside
    ]
    if problems:
        return problems
    if stored.split_by_expert:
        covered = dict.fromkeys(range(stored.num_experts), 0)
        for block in stored.blocks:
            covered[block.offset[0]] += block.numel
        full = stored.numel // stored.num_experts
        return [_missing_values(f"expert {e}", n, full) for e, n in covered.items() if n != full]
    total = sum(b.numel for b in stored.blocks)
    return [_missing_values("it", total, stored.numel)] if total != stored.numel else []


def first_few(messages: Sequence[str]) -> str:
    """Join the first messages, and say how many more there are."""
    rest = len(messages) - MAX_SHOWN_PROBLEMS
    return "; ".join(messages[:MAX_SHOWN_PROBLEMS]) + (f" (and {rest} more)" if rest > 0 else "")


def _missing_values(what: str, covered: int, total: int) -> str:
    return (
        f"{what} is covered for {covered:,} of {total:,} values"
        if covered
        else f"{what} is missing"
    )


def _describe_block(block: StoredBlock) -> str:
    return f"{list(block.shape)} at {list(block.offset)}"


def is_inside(block: StoredBlock, *, shape: Shape) -> bool:
    """Return whether a block lies in a tensor of ``shape``."""
    return len(block.shape) == len(shape) and all(
        o >= 0 and o + n <= full
        for o, n, full in zip(block.offset, block.shape, shape, strict=True)
    )
