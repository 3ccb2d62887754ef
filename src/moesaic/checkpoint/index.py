"""Index: where each block of each tensor of a checkpoint lies, for both forms of a checkpoint.

A whole one has a file per kind (``model.safetensors``), each tensor in one block. A sharded one
has a file per rank that wrote (``shard-00003.safetensors``) and an ``index.json``: the blocks of
tensors as ranks held them, but each expert of a bank by itself, under a name that carries its
global number: ``model/encoder.0.experts.up/expert-0007``. A block that is not all of its tensor or
expert has its offset behind an ``@``.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moesaic.checkpoint.manifest import Manifest
from moesaic.checkpoint.tensors import NAMES
from moesaic.core.errors import CheckpointError

INDEX = "index.json"
FORMAT = 1
SHOWN = 4
DTYPES = {name: dtype for dtype, name in NAMES.items()}
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a tensor: ``shape`` long from ``offset`` on, stored in ``file`` under ``key``."""

    file: str
    key: str
    offset: Shape
    shape: Shape

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a checkpoint. ``experts``: it is a bank of so many, along its first dim (or 0).

    ``split``: each expert is stored by itself, so that a block is one expert's and lacks that dim
    on disk.
    """

    shape: Shape
    dtype: torch.dtype
    blocks: tuple[Block, ...]
    experts: int = 0
    split: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def of_expert(self, expert: int) -> tuple[Block, ...]:
        """The blocks of one expert of a split bank."""
        return tuple(b for b in self.blocks if b.offset[0] == expert)


@dataclass(frozen=True, slots=True)
class Index:
    """``files``: kind of file (``model``, ``optimizer``) to name to what is stored."""

    files: Mapping[str, Mapping[str, Stored]]

    def __iter__(self) -> Iterator[tuple[str, str, Stored]]:
        for file, tensors in self.files.items():
            for name, stored in tensors.items():
                yield file, name, stored

    def text(self) -> str:
        """Return the content of ``index.json``: a line for each tensor."""
        lines = [
            f" {json.dumps([file, name], ensure_ascii=False)[1:-1]}, {_plain(stored)}"
            for file, name, stored in self
        ]
        body = ",\n".join(f" [{line.strip()}]" for line in lines)
        return f'{{"format": {FORMAT}, "tensors": [\n{body}\n]}}\n'


def bank_size(name: str, *, shape: Shape, banks: Mapping[str, int]) -> int:
    """Return how many experts a tensor holds along its first dim; 0 if it is no bank.

    ``name`` may be that of a parameter or of a slot of its optimizer state (``exp_avg/...``).
    """
    parameter = name if name in banks else name.partition("/")[2]
    experts = banks.get(parameter, 0)
    return experts if shape[:1] == (experts,) and math.prod(shape) else 0


def block_key(path: str, *, block: tuple[Shape, Shape], shape: Shape, split: bool) -> str:
    """Return the name of a block (offset and shape) of the tensor ``path`` in a file of shards."""
    offset, size = block
    if split:
        path, offset, size, shape = (
            f"{path}/expert-{offset[0]:04d}",
            offset[1:],
            size[1:],
            shape[1:],
        )
    whole = size == shape
    return path if whole else f"{path}@{','.join(str(o) for o in offset)}"


def read_index(directory: Path, *, manifest: Manifest) -> Index:
    """Return the index of a checkpoint of either form. Raises CheckpointError if it is damaged."""
    try:
        if INDEX in manifest.files:
            return _sharded(json.loads((directory / INDEX).read_bytes()))
        return _whole(directory, manifest=manifest)
    except SafetensorError as error:
        raise CheckpointError(f"{directory}: damaged safetensors file: {error}") from error
    except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
        raise CheckpointError(f"{directory / INDEX}: damaged ({error})") from error


def _sharded(body: dict[str, Any]) -> Index:
    if body["format"] != FORMAT:
        raise ValueError("written by another version of moesaic")
    files: dict[str, dict[str, Stored]] = {}
    for file, name, plain in body["tensors"]:
        shape, split = tuple(plain["shape"]), plain["split"]
        blocks = tuple(
            _block(f"{file}/{name}", plain=block, shape=shape, split=split)
            for block in plain["blocks"]
        )
        stored = Stored(shape, DTYPES[plain["dtype"]], blocks, plain["experts"], split)
        files.setdefault(file, {})[name] = stored
    return Index(files)


def _block(
    path: str, *, plain: tuple[str, list[int], list[int]], shape: Shape, split: bool
) -> Block:
    where = (tuple(plain[1]), tuple(plain[2]))
    return Block(plain[0], block_key(path, block=where, shape=shape, split=split), *where)


def _whole(directory: Path, *, manifest: Manifest) -> Index:
    files: dict[str, dict[str, Stored]] = {}
    for file in sorted(n for n in manifest.files if n.endswith(".safetensors")):
        with safe_open(directory / file, framework="pt") as opened:
            heads = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            tensors = files.setdefault(file.removesuffix(".safetensors"), {})
            for name, head in heads.items():
                shape = tuple(head.get_shape())
                block = Block(file, name, (0,) * len(shape), shape)
                experts = bank_size(name, shape=shape, banks=manifest.banks)
                tensors[name] = Stored(shape, DTYPES[head.get_dtype()], (block,), experts)
    return Index(files)


def _plain(stored: Stored) -> str:
    value = {
        "dtype": NAMES[stored.dtype],
        "shape": stored.shape,
        "experts": stored.experts,
        "split": stored.split,
        "blocks": [(b.file, b.offset, b.shape) for b in stored.blocks],
    }
    return json.dumps(value)


def overlaps(blocks: Iterable[Block]) -> Iterator[tuple[Block, Block]]:
    """Yield each pair of blocks that share a value, by a sweep along the dim with most offsets."""
    held = [block for block in blocks if block.numel]
    if not held or not held[0].shape:
        yield from ((held[0], other) for other in held[1:])
        return
    offsets = [{block.offset[dim] for block in held} for dim in range(len(held[0].shape))]
    dim = max(range(len(offsets)), key=lambda d: len(offsets[d]))
    active: list[Block] = []
    for block in sorted(held, key=lambda b: b.offset[dim]):
        active = [b for b in active if b.offset[dim] + b.shape[dim] > block.offset[dim]]
        yield from ((other, block) for other in active if _meet(other, block))
        active.append(block)


def _meet(one: Block, other: Block) -> bool:
    sides = zip(one.offset, one.shape, other.offset, other.shape, strict=True)
    return all(a < b + m and b < a + n for a, n, b, m in sides)


def gaps(stored: Stored) -> list[str]:
    """Return what is wrong with how blocks cover a tensor: overlaps, holes, missing experts."""
    found = [
        f"{_spot(one)} of {one.file} and {_spot(other)} of {other.file} overlap"
        for one, other in overlaps(stored.blocks)
    ]
    outside = [b for b in stored.blocks if not _inside(b, shape=stored.shape)]
    found += [f"{_spot(b)} of {b.file} reaches out of {list(stored.shape)}" for b in outside]
    if found:
        return found
    if stored.split:
        held = dict.fromkeys(range(stored.experts), 0)
        for block in stored.blocks:
            held[block.offset[0]] += block.numel
        full = stored.numel // stored.experts
        return [_short(f"expert {e}", held=n, of=full) for e, n in held.items() if n != full]
    held = sum(b.numel for b in stored.blocks)
    return [_short("it", held=held, of=stored.numel)] if held != stored.numel else []


def some(sentences: Sequence[str]) -> str:
    """Return the first few, and how many more there are."""
    more = f" (and {len(sentences) - SHOWN} more)" if len(sentences) > SHOWN else ""
    return "; ".join(sentences[:SHOWN]) + more


def _short(what: str, *, held: int, of: int) -> str:
    return f"{what} is covered for {held:,} of {of:,} values" if held else f"{what} is missing"


def _spot(block: Block) -> str:
    return f"{list(block.shape)} at {list(block.offset)}"


def _inside(block: Block, *, shape: Shape) -> bool:
    return len(block.shape) == len(shape) and all(
        o >= 0 and o + n <= whole
        for o, n, whole in zip(block.offset, block.shape, shape, strict=True)
    )
