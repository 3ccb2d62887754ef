"""Disk store: tensors in files at fixed offsets, read and written through bounded buffers.

A file grows when a tensor in it is first updated: that reserves its blocks, so a full disk is met
before anything is changed, by an error that names the file. Reads and writes run on one thread in
the order of the calls, so a read after a write sees it. Nothing is synced: the tier is no
checkpoint, and its files, which have no directory entry, end with the process.
"""

import errno
import mmap
import os
import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from moesaic.core.errors import UserError
from moesaic.core.shapes import Tensor
from moesaic.core.units import show_bytes
from moesaic.memory.chunked_store import Chunk, ChunkedStore
from moesaic.memory.device_copies import Event
from moesaic.memory.named_copies import NamedCopies
from moesaic.memory.tensor_store import Access, FetchedTensors, Part, Place, TensorSpec

COPY_BYTES = 2**22
CALL_BYTES = 2**30  # Linux moves at most 2 GiB in one call


class DiskFullError(UserError):
    """The disk of a memory tier has no room for a tensor that is to be written."""


class FileChunk(Chunk):
    """A chunk in a file without a directory entry; ``path`` is the name it was made with.

    Raises DiskFullError if the file may not be so large, UserError if it cannot be made.
    """

    def __init__(self, path: Path, num_bytes: int) -> None:
        super().__init__(num_bytes)
        self.path, self._copies = path, 0
        self.file = _open_unlinked(path)
        weakref.finalize(self, os.close, self.file)  # a mapping of it stays valid
        try:
            os.ftruncate(self.file, num_bytes)
        except OSError as error:
            raise self._without_room(num_bytes, error) from error

    def mapping(self) -> Any:
        return mmap.mmap(self.file, self.num_bytes)

    def reserve(self, offset: int, num_bytes: int) -> None:
        """Allocate blocks of the file. Raises DiskFullError."""
        if not num_bytes:
            return
        try:
            os.posix_fallocate(self.file, offset, num_bytes)
        except OSError as error:
            raise self._without_room(num_bytes, error) from error

    def _without_room(self, num_bytes: int, error: OSError) -> Exception:
        """Return what to raise for an error of the disk: itself if it is of another kind."""
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return error
        free = os.fstatvfs(self.file)
        limit = "files may not be so large (ulimit -f)" if error.errno == errno.EFBIG else ""
        return DiskFullError(
            f"{self.path}: no room for {show_bytes(num_bytes)} more of a memory tier "
            f"({limit or show_bytes(free.f_bavail * free.f_frsize) + ' are free on its disk'}): "
            'free some, or name another folder in parallel.memory (DiskStorage(folder="..."))'
        )

    def copy(self) -> "FileChunk":
        self._copies += 1
        copied = FileChunk(self.path.with_suffix(f".{self._copies}"), self.num_bytes)
        copied.used, copied._copies = self.used, self._copies
        for start, end in _data_extents(self.file, self.used):
            copied.reserve(start, end - start)
            for at in range(start, end, COPY_BYTES):
                content = os.pread(self.file, min(COPY_BYTES, end - at), at)
                os.pwrite(copied.file, content, at)
        return copied


class DiskStore(ChunkedStore):
    """Tensors in files of ``folder``.

    ``in_flight_bytes`` bounds what is being read, in use and being written; one ``fetch`` may
    exceed it alone. ``peak_in_flight`` is the most that there was.
    """

    def __init__(
        self, folder: Path, *, device: torch.device, label: str, in_flight_bytes: int
    ) -> None:
        super().__init__(device, label=label, in_flight_bytes=in_flight_bytes)
        self.folder = folder
        self.in_flight, self.peak_in_flight = 0, 0
        self._in_use: Counter[int] = Counter()  # bytes by the thread that has fetched them
        self._reserved: set[Part] = set()
        self._thread: ThreadPoolExecutor | None = None
        self._writes: list[tuple[Future[None], int]] = []
        self._named = None if self.copies is None else NamedCopies(self.copies)

    def reserve(self, parts: Sequence[Part]) -> None:
        super().reserve(parts)  # a copy has blocks for what is written, not for what is reserved
        new = [part for part in parts if part not in self._reserved]
        for part in new:
            spec, at = self.specs[part.name], self._locations[part.name]
            chunk = self._chunks[at.chunk]
            assert isinstance(chunk, FileChunk)
            chunk.reserve(at.offset + _row_offset(spec, part), spec.of(part).num_bytes)
        self._reserved.update(new)

    def synchronize(self) -> None:
        while self._writes:
            self._finish_write()

    def close(self) -> None:
        super().close()
        self._reserved = set()  # a tensor of the same name may follow, in another file
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _new_chunk(self, num_bytes: int) -> Chunk:
        name = f"moesaic-{os.getpid()}-{self.label}-{len(self._chunks)}.bin"
        return FileChunk(self.folder / name, num_bytes)

    def moves_to(self, place: Place) -> bool:  # noqa: ARG002
        return True

    def _fetch(
        self,
        parts: Sequence[Part],
        *,
        access: Access,
        place: Place,
        into: Sequence[Tensor] | None,
    ) -> FetchedTensors:
        specs = [self.specs[part.name].of(part) for part in parts]
        num_bytes = sum(spec.num_bytes for spec in specs)
        self._make_room(num_bytes)
        user = threading.get_ident()
        self._in_use[user] += num_bytes
        make = torch.empty if self.copies is None else self.copies.streams.host_memory
        buffers = [make(spec.shape, dtype=spec.dtype) for spec in specs]
        read = [] if access is Access.REPLACE else parts
        reading = self._submit(os.preadv, read, buffers[: len(read)])
        named = self._named if place is Place.DEVICE else None
        moved: list[FetchedTensors] = []

        def wait() -> list[Tensor]:
            reading.result()
            if named is None:
                return buffers
            if not moved:
                each = [(part.name, buffer) for part, buffer in zip(parts, buffers, strict=True)]
                moved.append(named.fetch(each, place=place, access=access, into=into))
            return moved[0].wait()

        def release() -> None:
            wait()
            for each in moved:
                each.release()
            self._in_use[user] -= num_bytes
            if access is not Access.READ:
                left = self.copies.to_host.latest if moved and self.copies else None
                written = self._submit(os.pwritev, parts, buffers, after=left)
                self._writes.append((written, num_bytes))
            else:
                self.in_flight -= num_bytes

        return FetchedTensors(wait, release)

    def _make_room(self, num_bytes: int) -> None:
        mine = threading.get_ident()
        while self.in_flight and self.in_flight + num_bytes > self.in_flight_bytes:
            if self._writes:
                self._finish_write()
            elif self._in_use[mine]:
                raise RuntimeError(
                    f"{self.label}: {self.in_flight} bytes are in use, {num_bytes} are asked for, "
                    f"over the bound of {self.in_flight_bytes}: release something first"
                )
            else:  # another thread releases what it has
                self._changed.wait()
        self.in_flight += num_bytes
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)

    def _finish_write(self) -> None:
        written, num_bytes = self._writes.pop(0)
        self.in_flight -= num_bytes
        written.result()

    def _submit(
        self,
        action: Any,
        parts: Sequence[Part],
        buffers: Sequence[Tensor],
        *,
        after: Event | None = None,
    ) -> "Future[None]":
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix=self.label)
        return self._thread.submit(self._transfer, action, parts, buffers, after)

    def _transfer(
        self, action: Any, parts: Sequence[Part], buffers: Sequence[Tensor], after: Event | None
    ) -> None:
        """Read (``os.preadv``) or write (``os.pwritev``) whole buffers, after a copy to them."""
        if after is not None:
            after.synchronize()
        for part, buffer in zip(parts, buffers, strict=True):
            file, offset = self._position(part)
            memory: Any = buffer.view(-1).view(torch.uint8).numpy()
            done = 0
            while done < len(memory):
                count = action(file, [memory[done : done + CALL_BYTES]], offset + done)
                if not count:
                    raise OSError(f"{self.label}: the file of {part.name} ends too early")
                done += count

    def _position(self, part: Part) -> tuple[int, int]:
        at = self._locations[part.name]
        chunk = self._chunks[at.chunk]
        assert isinstance(chunk, FileChunk)
        return chunk.file, at.offset + _row_offset(self.specs[part.name], part)


def _row_offset(spec: TensorSpec, part: Part) -> int:
    return spec.of(Part(part.name, 0, part.start)).num_bytes if part.start else 0


def _open_unlinked(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        path.unlink()
    except OSError as error:
        raise UserError(
            f"{path}: this file of a memory tier cannot be made ({error.strerror}): name a folder "
            'that may be written to in parallel.memory (DiskStorage(folder="..."))'
        ) from error
    return file


def _data_extents(file: int, size: int) -> list[tuple[int, int]]:
    """Return the parts of a sparse file that have blocks."""
    extents, end = [], 0
    while end < size:
        try:
            start = os.lseek(file, end, os.SEEK_DATA)
        except OSError:  # nothing but a hole is left
            break
        end = min(os.lseek(file, start, os.SEEK_HOLE), size)
        if start >= size:
            break
        extents.append((start, end))
    return extents
