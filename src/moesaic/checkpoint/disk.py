"""Disk: the few operations that saving is made of, each one a place where a machine can die."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from moesaic.core.shapes import Tensor

Buffer = bytes | memoryview


class Disk:
    """The real file system. Tests subclass it to fail at the n-th operation."""

    def make_dir(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, *, chunks: Iterable[Buffer]) -> None:
        """Write a new file and wait until it is on the medium."""
        with path.open("wb") as stream:
            for piece in chunks:
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())

    def rename(self, old: Path, *, new: Path) -> None:
        """Move atomically, replacing a file (not a full directory) of that name."""
        old.rename(new)

    def sync_dir(self, path: Path) -> None:
        """Make the names in a directory durable."""
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def remove(self, path: Path) -> None:
        """Remove a file or a whole directory; nothing there is fine."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def free_bytes(self, path: Path) -> int:
        return shutil.disk_usage(path).free


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the data of ``tensors``."""
    return sum(t.numel() * t.element_size() for t in tensors)
