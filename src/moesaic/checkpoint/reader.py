"""Reader: tensors of a checkpoint, or parts of them, read from the files that hold them.

Files are mapped, so a part costs what it is long.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moesaic.checkpoint.index import Block, Shape, Stored, gaps, overlaps, some
from moesaic.core.errors import CheckpointError
from moesaic.core.shapes import Tensor

OPEN_FILES = 64


class Reader:
    """Reads from ``directory``; at most ``OPEN_FILES`` are open at a time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stack = ExitStack()
        self._opened: dict[str, Any] = {}

    def close(self) -> None:
        self._opened.clear()
        self._stack.close()

    def part(self, stored: Stored, *, block: Block, start: Shape, shape: Shape) -> Tensor:
        """Return ``shape`` values of a block from ``start`` on (within the block): a view.

        Raises CheckpointError if the file does not hold what the index says.
        """
        try:
            head = self._file(block.file).get_slice(block.key)
            data = head[:] if head.get_shape() else head[()]
        except (SafetensorError, OSError) as error:
            path = self.directory / block.file
            raise CheckpointError(f"{path}: {block.key} cannot be read: {error}") from error
        expected = block.shape[1:] if stored.split else block.shape
        if (tuple(data.shape), data.dtype) != (expected, stored.dtype):
            raise CheckpointError(
                f"{self.directory / block.file}: {block.key} is {data.dtype} {list(data.shape)}, "
                f"expected {stored.dtype} {list(expected)}"
            )
        data = data.view(block.shape)
        for dim, (first, length) in enumerate(zip(start, shape, strict=True)):
            data = data.narrow(dim, first, length)
        return data

    def block(self, stored: Stored, block: Block) -> Tensor:
        """Return one block."""
        return self.part(stored, block=block, start=(0,) * len(block.shape), shape=block.shape)

    def tensor(self, stored: Stored) -> Tensor:
        """Return a whole tensor; not copied where it lies in one block.

        Raises CheckpointError, also if its blocks do not make it up.
        """
        return self._joined(stored, blocks=stored.blocks, first=0, shape=stored.shape)

    def expert(self, stored: Stored, expert: int) -> Tensor:
        """Return one expert of a bank, without the first dim."""
        if not stored.split:
            return self.tensor(stored)[expert]
        blocks, shape = stored.of_expert(expert), (1, *stored.shape[1:])
        return self._joined(stored, blocks=blocks, first=expert, shape=shape)[0]

    def _joined(
        self, stored: Stored, *, blocks: tuple[Block, ...], first: int, shape: Shape
    ) -> Tensor:
        if len(blocks) == 1 and blocks[0].shape == shape:
            return self.block(stored, blocks[0])
        whole = torch.empty(shape, dtype=stored.dtype)
        held = sum(block.numel for block in blocks)
        if held != whole.numel() or any(overlaps(blocks)):
            raise CheckpointError(f"{self.directory}: {some(gaps(stored))}")
        for block in blocks:
            part = whole
            for dim, (offset, length) in enumerate(zip(block.offset, block.shape, strict=True)):
                part = part.narrow(dim, offset - (first if dim == 0 else 0), length)
            part.copy_(self.block(stored, block))
        return whole

    def _file(self, name: str) -> Any:
        if name not in self._opened:
            if len(self._opened) >= OPEN_FILES:
                self.close()
            file = safe_open(self.directory / name, framework="pt")
            self._opened[name] = self._stack.enter_context(file)
        return self._opened[name]


@contextmanager
def reading(directory: Path) -> Iterator[Reader]:
    """Give a reader, and close its files at the end."""
    reader = Reader(directory)
    try:
        yield reader
    finally:
        reader.close()
