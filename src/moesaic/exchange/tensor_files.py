"""Tensor files: regions of tensors in safetensors files, read by byte ranges and put together.

No file is mapped into memory and no tensor is read whole, so a checkpoint of any size needs the
memory of a matrix or of ``BLOCK_BYTES``, whichever is larger.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, cast

import torch

from moesaic.checkpoint.block_index import DTYPE_BY_NAME
from moesaic.checkpoint.safetensors_io import read_header
from moesaic.core.errors import CheckpointError
from moesaic.core.shapes import Tensor
from moesaic.exchange.mxfp4 import dequantise_mxfp4
from moesaic.exchange.tensor_table import Region, Shape, TensorPiece

BLOCK_BYTES = 64 * 2**20
BLOCKS, SCALES = "_blocks", "_scales"  # of a tensor in MXFP4


class ReadableTensor(Protocol):
    """A tensor in files, of which boxes are read."""

    @property
    def shape(self) -> Shape: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def read(self, offset: Shape, shape: Shape) -> Tensor:
        """Return the values of a box that is not empty, of a scalar its value."""
        ...


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor in a file, whose data begin at byte ``start``."""

    path: Path
    shape: Shape
    dtype: torch.dtype
    start: int

    def read(self, offset: Shape, shape: Shape) -> Tensor:
        """Return the values of a box. Raises CheckpointError if the file became shorter.

        One range of bytes is read: the box's rows, along its first dim with more than one.
        """
        dim = next((d for d, size in enumerate(shape) if size > 1), max(0, len(shape) - 1))
        strides = [math.prod(self.shape[d + 1 :]) for d in range(len(shape))]
        first = sum(o * s for o, s in zip(offset[: dim + 1], strides, strict=False))
        count = shape[dim] * strides[dim] if shape else 1
        values = self._read_values(first, count)
        if shape:
            values = values.view(*shape[: dim + 1], *self.shape[dim + 1 :])
        return narrowed(values if shape else values.view(()), offset, shape, first=dim + 1)

    def _read_values(self, first: int, count: int) -> Tensor:
        data = bytearray(count * self.dtype.itemsize)
        with self.path.open("rb") as stream:
            stream.seek(self.start + first * self.dtype.itemsize)
            if stream.readinto(data) != len(data):
                raise CheckpointError(f"{self.path}: it became shorter while it was read")
        return torch.frombuffer(data, dtype=self.dtype)


@dataclass(frozen=True, slots=True)
class MXFP4Tensor:
    """Matrices of experts [E, D, F] in MXFP4, as GPT-OSS stores them: by rows of F, 32 in a block.

    ``blocks`` [E, F, D/32, 16] have two values of 4 bits in a byte, ``scales`` [E, F, D/32] the
    exponent of a block. Their values are those of bfloat16 without rounding.
    """

    blocks: FileTensor
    scales: FileTensor
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> Shape:
        experts, outputs, blocks, size = self.blocks.shape
        return experts, 2 * size * blocks, outputs

    def read(self, offset: Shape, shape: Shape) -> Tensor:
        """Return the values of some experts, dequantised."""
        blocks, scales = (
            tensor.read(offset[:1] + (0,) * (len(tensor.shape) - 1), shape[:1] + tensor.shape[1:])
            for tensor in (self.blocks, self.scales)
        )
        return narrowed(dequantise_mxfp4(blocks, scales).transpose(1, 2), offset, shape, first=1)


def narrowed(values: Tensor, offset: Shape, shape: Shape, *, first: int) -> Tensor:
    """Return a view of a box along the dims from ``first`` on."""
    for dim in range(first, len(shape)):
        values = values.narrow(dim, offset[dim], shape[dim])
    return values


class TensorFiles:
    """The tensors of safetensors files by name; ``repeated`` names are there twice.

    ``notes`` say what is left out of what the files have.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, paths: Iterable[Path]) -> None:
        found: dict[str, FileTensor] = {}
        self.repeated: list[str] = []
        for path in paths:
            header = read_header(path)
            ends = [entry.end for entry in header.tensors.values()]
            first = path.stat().st_size - max(ends, default=0)
            for name, entry in header.tensors.items():
                if name in found:
                    self.repeated.append(name)
                dtype, start = DTYPE_BY_NAME[entry.dtype], first + entry.start
                found[name] = FileTensor(path, entry.shape, dtype, start)
        self.tensors = _join_mxfp4(found)

    def read(self, region: Region) -> Tensor:
        """Return the values of a region. Raises CheckpointError if the file became shorter."""
        tensor = self.tensors[region.name]
        if not region.numel:
            return torch.empty(region.shape, dtype=tensor.dtype)
        return tensor.read(region.offset, region.shape)


def _join_mxfp4(found: Mapping[str, FileTensor]) -> dict[str, ReadableTensor]:
    """Return the tensors with those of blocks and scales as one, without the suffix."""
    tensors: dict[str, ReadableTensor] = dict(found)
    for name, blocks in found.items():
        base = name.removesuffix(BLOCKS)
        scales = found.get(base + SCALES)
        if base == name or scales is None or blocks.shape[:-1] != scales.shape:
            continue
        if len(blocks.shape) == 4 and {blocks.dtype, scales.dtype} == {torch.uint8}:
            del tensors[name], tensors[base + SCALES]
            tensors[base] = MXFP4Tensor(blocks, scales)
    return tensors


def target_tensors(pieces: Sequence[TensorPiece], files: TensorFiles) -> dict[str, Tensor]:
    """Return the tensors that pieces are put together to, without values (on ``meta``).

    Parts of different dtypes make a tensor of the dtype that holds them all.
    """
    ends: dict[str, Shape] = {}
    dtypes: dict[str, torch.dtype] = {}
    for piece in pieces:
        name, dtype = piece.target.name, files.tensors[piece.source.name].dtype
        ends[name] = tuple(map(max, ends.get(name, piece.target.end), piece.target.end))
        dtypes[name] = torch.promote_types(dtypes.get(name, dtype), dtype)
    return {
        name: torch.empty(shape, dtype=dtypes[name], device="meta") for name, shape in ends.items()
    }


class PutTogether:
    """Yields the values of a target tensor, some rows at a time."""

    def __init__(self, pieces: Sequence[TensorPiece], files: TensorFiles) -> None:
        self.files, self.targets = files, target_tensors(pieces, files)
        self._pieces: Mapping[str, list[TensorPiece]] = defaultdict(list)
        for piece in pieces:
            self._pieces[piece.target.name].append(piece)

    def __call__(self, name: str) -> Iterator[Tensor]:
        target, groups = self.targets[name], defaultdict(list)
        for piece in self._pieces[name]:
            groups[piece.target.offset[:1], piece.target.end[:1]].append(piece)
        covered = 0
        for _, pieces in sorted(groups.items()):
            covered += sum(piece.target.numel for piece in pieces)
            for block in _blocks(pieces, row_bytes=_row_bytes(target)):
                yield self._read(block, dtype=target.dtype)
        assert covered == target.numel(), f"{name}: pieces overlap or leave gaps"

    def _read(self, pieces: Sequence[TensorPiece], *, dtype: torch.dtype) -> Tensor:
        first = pieces[0].target
        if len(pieces) == 1:
            return self._piece(pieces[0]).to(dtype)
        width = sum(piece.target.shape[-1] for piece in pieces)
        chunk = torch.empty((*first.shape[:-1], width), dtype=dtype)
        for piece in pieces:
            start = piece.target.offset[-1]
            chunk.narrow(-1, start, piece.target.shape[-1]).copy_(self._piece(piece))
        return chunk

    def _piece(self, piece: TensorPiece) -> Tensor:
        values = self.files.read(piece.source)
        if piece.transposed:
            values = values.transpose(-1, -2)
        if piece.order is not None:
            order = torch.tensor(piece.order)
            values = values.index_select(piece.dim, order)
        return values.reshape(piece.target.shape)


def _row_bytes(target: Tensor) -> int:
    return max(1, math.prod(target.shape[1:]) * target.dtype.itemsize)


def _blocks(pieces: list[TensorPiece], *, row_bytes: int) -> Iterator[Sequence[TensorPiece]]:
    """Yield a plain copy in blocks of rows, anything else as it is."""
    piece = pieces[0]
    rows = piece.target.shape[0] if piece.target.shape else 1
    moved = piece.transposed or piece.order is not None
    if len(pieces) > 1 or moved or rows * row_bytes <= BLOCK_BYTES:
        yield pieces
        return
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, rows, step):
        size = min(step, rows - start)
        yield (replace(piece, **{s: _rows(piece, s, start, size) for s in ("target", "source")}),)


def _rows(piece: TensorPiece, side: str, start: int, size: int) -> Region:
    region = cast(Region, piece.target if side == "target" else piece.source)
    offset = (region.offset[0] + start, *region.offset[1:])
    return replace(region, offset=offset, shape=(size, *region.shape[1:]))
