"""Tensor reader: read tensors of a checkpoint, or slices of them, from memory-mapped files."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moesaic.checkpoint.block_index import (
    Shape,
    StoredBlock,
    StoredTensor,
    coverage_problems,
    expert_label,
    first_few,
    is_inside,
    overlapping_blocks,
)
from moesaic.core.errors import CheckpointError
from moesaic.core.shapes import Tensor

MAX_OPEN_FILES = 64


class TensorReader:
    """Reads tensors from ``directory`` with at most ``MAX_OPEN_FILES`` open files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stack = ExitStack()
        self._opened: dict[str, Any] = {}

    def close(self) -> None:
        self._opened.clear()
        self._stack.close()

    def read_slice(
        self, stored: StoredTensor, *, block: StoredBlock, start: Shape, shape: Shape
    ) -> Tensor:
        """Return a slice of a block as a view: ``shape`` values at ``start`` of the block.

        Raises CheckpointError if the file differs from the index.
        """
        try:
            head = self._file(block.file).get_slice(block.key)
            data = head[:] if head.get_shape() else head[()]
        except (SafetensorError, OSError) as error:
            path = self.directory / block.file
            raise CheckpointError(f"{path}: {block.key} cannot be read: {error}") from error
        expected = block.shape[1:] if stored.split_by_expert else block.shape
        if (tuple(data.shape), data.dtype) != (expected, stored.dtype):
            raise CheckpointError(
                f"{self.directory / block.file}: {block.key} is {data.dtype} {list(data.shape)}, "
                f"expected {stored.dtype} {list(expected)}"
            )
        data = data.view(block.shape)
        for dim, (first, length) in enumerate(zip(start, shape, strict=True)):
            data = data.narrow(dim, first, length)
        return data

    def read_block(self, stored: StoredTensor, block: StoredBlock) -> Tensor:
        """Return one block."""
        return self.read_slice(
            stored, block=block, start=(0,) * len(block.shape), shape=block.shape
        )

    def read_tensor(self, stored: StoredTensor) -> Tensor:
        """Return a full tensor, without a copy if it is stored in one block.

        Raises CheckpointError, also if its blocks do not cover it.
        """
        return self._assemble(stored, blocks=stored.blocks, first=0, shape=stored.shape)

    def read_expert(self, stored: StoredTensor, expert: int) -> Tensor:
        """Return one expert of a tensor, without the first dim."""
        if not stored.split_by_expert:
            return self.read_tensor(stored)[expert]
        blocks, shape = stored.expert_blocks(expert), (1, *stored.shape[1:])
        return self._assemble(stored, blocks=blocks, first=expert, shape=shape)[0]

    def _assemble(
        self, stored: StoredTensor, *, blocks: tuple[StoredBlock, ...], first: int, shape: Shape
    ) -> Tensor:
        if len(blocks) == 1 and blocks[0].shape == shape:
            return self.read_block(stored, blocks[0])
        covered = sum(block.numel for block in blocks)
        outside = any(not is_inside(block, shape=stored.shape) for block in blocks)
        if outside or covered != math.prod(shape) or any(overlapping_blocks(blocks)):
            raise CheckpointError(f"{self.directory}: {first_few(coverage_problems(stored))}")
        full = torch.empty(shape, dtype=stored.dtype)  # not before its blocks were added up
        for block in blocks:
            part = full
            for dim, (offset, length) in enumerate(zip(block.offset, block.shape, strict=True)):
                part = part.narrow(dim, offset - (first if dim == 0 else 0), length)
            part.copy_(self.read_block(stored, block))
        return full

    def _file(self, name: str) -> Any:
        if name not in self._opened:
            if len(self._opened) >= MAX_OPEN_FILES:
                self.close()
            file = safe_open(self.directory / name, framework="pt")
            self._opened[name] = self._stack.enter_context(file)
        return self._opened[name]


@contextmanager
def open_reader(directory: Path) -> Iterator[TensorReader]:
    """Yield a reader and close its files at the end."""
    reader = TensorReader(directory)
    try:
        yield reader
    finally:
        reader.close()


@dataclass(frozen=True, slots=True)
class LoadedTensor:
    """A tensor, or one expert of a tensor (without the first dim)."""

    label: str
    data: Tensor
    expert: int | None = None


def read_by_expert(
    reader: TensorReader, *, label: str, stored: StoredTensor, num_experts: int = 0
) -> Iterator[LoadedTensor]:
    """Yield a tensor, or its experts one by one.

    ``num_experts`` splits a tensor that the index does not mark as split by expert.
    """
    count = stored.num_experts or num_experts
    if not count:
        yield LoadedTensor(label, reader.read_tensor(stored))
    for expert in range(count):
        yield LoadedTensor(expert_label(label, expert), reader.read_expert(stored, expert), expert)
