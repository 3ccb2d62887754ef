"""Checkpoint directory: atomic publication and retention of checkpoints.

``manifest.json`` (``manifest.py``) is written last. ``serial`` counts the saves of a root: after a
run went back to an earlier step, the newest checkpoint is that with the highest serial, not the
highest step.

Order of writing: write ``.step-N.part/``, sync, rename to ``step-N/``, update ``best`` and then
``latest``, delete old checkpoints. A crash at any point leaves every earlier checkpoint complete,
and at most a hidden directory that the next save removes. One job saves into a root.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

from moesaic.checkpoint.manifest import MANIFEST_FILE, Manifest, read_manifest
from moesaic.core.errors import CheckpointError
from moesaic.core.file_reader import KIB, FileEntry, FileKind, read_text
from moesaic.core.units import show_bytes

Buffer = bytes | memoryview


class Disk:
    """File operations of saving. Tests subclass it to fail at the n-th operation."""

    def make_dir(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, *, chunks: Iterable[Buffer]) -> None:
        """Write a new file and sync it."""
        with path.open("wb") as stream:
            for chunk in chunks:
                stream.write(chunk)
                del chunk  # before the next one is made: one of them is as large as a matrix
            stream.flush()
            os.fsync(stream.fileno())

    def resize(self, path: Path, size: int) -> None:
        """Give a file ``size`` bytes: the new ones are zero."""
        os.truncate(path, size)

    def write_at(self, path: Path, *, chunks: Iterable[tuple[int, Buffer]]) -> None:
        """Write chunks at their bytes of an existing file, and sync it."""
        with path.open("r+b") as stream:
            for start, chunk in chunks:
                stream.seek(start)
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())

    def rename(self, old: Path, *, new: Path) -> None:
        """Rename atomically; replaces an existing file, not a directory with content."""
        old.rename(new)

    def sync_dir(self, path: Path) -> None:
        """Sync the entries of a directory."""
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def remove(self, path: Path) -> None:
        """Remove a file or a directory tree, if it exists."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def free_bytes(self, path: Path) -> int:
        return shutil.disk_usage(path).free


STEP_DIRECTORY = re.compile(r"step-(\d{8,})(\.replaced)?")
STATE_FILE = "state.json"
POINTER_FILE = FileKind(name="pointer to a checkpoint", max_bytes=4 * KIB, error=CheckpointError)
OVERHEAD_BYTES = 1 << 20  # headers, manifest, rounding to file system blocks


@dataclass(frozen=True, slots=True)
class CheckpointPaths:
    """Staging and final directory of a checkpoint, and the bytes it requires."""

    root: Path
    step: int
    required_bytes: int

    @property
    def final(self) -> Path:
        return self.root / f"step-{self.step:08d}"

    @property
    def staging(self) -> Path:
        return self.root / f".{self.final.name}.part"

    def create_staging(self, disk: Disk) -> int:
        """Remove leftovers of an interrupted save; return the serial number of the new one.

        Raises OSError if there is not enough free space.
        """
        disk.make_dir(self.root)
        for path in [*self.root.glob(".*.part"), *self.root.glob(".*.gone")]:
            disk.remove(path)
        if disk.free_bytes(self.root) < self.required_bytes:
            raise OSError(errno.ENOSPC, "No space left on device")
        serial = 1 + max((_serial_number(p) for p in list_checkpoints(self.root)), default=0)
        disk.make_dir(self.staging)
        return serial

    def disk_error(self, error: OSError, *, disk: Disk, rank: str = "") -> CheckpointError:
        """Return the error to show for an OSError; ``rank`` is e.g. ``on rank 3``."""
        free = "unknown"
        with suppress(OSError):
            free = show_bytes(disk.free_bytes(self.root))
        full = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
        if error.errno in full:
            why = f"{full[error.errno]}: needed {show_bytes(self.required_bytes)}, free {free}"
            way_out = "Free some space, keep fewer checkpoints, or use another directory."
        else:
            why = error.strerror or str(error)
            way_out = "Check that the directory can be written, or use another one."
        where = f" {rank}" if rank else ""
        return CheckpointError(
            f"{self.final}: saving failed{where}, {why}. Earlier checkpoints are intact. {way_out}"
        )

    def remove_staging(self, disk: Disk) -> None:
        """Remove the staging directory of a failed save."""
        with suppress(OSError):
            disk.remove(self.staging)


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """Keep the ``num_newest`` newest checkpoints, and the one last saved as ``best``."""

    num_newest: int = 3
    best: bool = False


@dataclass(frozen=True, slots=True)
class CheckpointMetadata:
    """What a checkpoint contains besides tensors (see ``Snapshot``); ``state`` as JSON bytes."""

    step: int
    state: bytes
    expert_parameters: Mapping[str, int]
    plan: Mapping[str, Any]


def write_manifest(
    paths: CheckpointPaths,
    *,
    metadata: CheckpointMetadata,
    serial: int,
    entries: Mapping[str, FileEntry],
    disk: Disk,
) -> None:
    """Write state and manifest into a staging directory whose other files are written."""
    files = {
        **entries,
        STATE_FILE: write_hashed(paths.staging / STATE_FILE, [metadata.state], disk=disk),
    }
    manifest = Manifest(
        step=metadata.step,
        serial=serial,
        files=files,
        versions={name: version(name) for name in ("moesaic", "torch", "safetensors")},
        expert_parameters=dict(metadata.expert_parameters),
        plan=dict(metadata.plan),
    )
    disk.write(paths.staging / MANIFEST_FILE, chunks=[manifest.to_json().encode()])
    disk.sync_dir(paths.staging)


def publish_checkpoint(paths: CheckpointPaths, *, retention: RetentionPolicy, disk: Disk) -> None:
    """Rename a complete staging directory, update the pointers, delete old checkpoints."""
    final = paths.final
    replaced = final.with_name(final.name + ".replaced")
    if final.is_symlink() or final.is_file():  # no checkpoint: a link, dangling or not, or a file
        disk.remove(final)
    if (
        final.exists()
    ):  # saved before a resume from an earlier step: the old one stays loadable until the rename
        if replaced.exists():
            _delete_checkpoint(replaced, disk=disk)
        disk.rename(final, new=replaced)
    disk.rename(paths.staging, new=final)
    disk.sync_dir(paths.root)
    if replaced.exists():
        _delete_checkpoint(replaced, disk=disk)
    for pointer in ["best"] * retention.best + ["latest"]:
        _write_pointer(paths.root / pointer, final.name, disk=disk)
    _delete_oldest(paths.root, keep=retention.num_newest, disk=disk)


def write_checkpoint(
    paths: CheckpointPaths,
    *,
    metadata: CheckpointMetadata,
    retention: RetentionPolicy,
    disk: Disk,
    write_files: Callable[[Path], Mapping[str, FileEntry]],
) -> Path:
    """Write a checkpoint from one process; ``write_files`` writes the tensors into a directory.

    Raises CheckpointError on a disk error; then nothing of the new checkpoint is left.
    """
    try:
        serial = paths.create_staging(disk)
        entries = write_files(paths.staging)
        write_manifest(paths, metadata=metadata, serial=serial, entries=entries, disk=disk)
        publish_checkpoint(paths, retention=retention, disk=disk)
    except OSError as error:
        paths.remove_staging(disk)
        raise paths.disk_error(error, disk=disk) from error
    return paths.final


def list_checkpoints(root: Path) -> list[Path]:
    """Return the visible checkpoint directories, newest first; one without a manifest comes last.

    Newest is the highest serial number, not the highest step.
    """
    paths = [p for p in root.glob("step-*") if p.is_dir() and STEP_DIRECTORY.fullmatch(p.name)]
    return sorted(
        paths, key=lambda p: (_serial_number(p), not p.name.endswith(".replaced"), p.name)
    )[::-1]


def write_hashed(path: Path, chunks: Iterable[Buffer], *, disk: Disk) -> FileEntry:
    """Write a file; return its size and the hash of the bytes written."""
    digest, size = hashlib.sha256(), 0

    def hashed() -> Iterator[Buffer]:
        nonlocal size
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            yield chunk

    disk.write(path, chunks=hashed())
    return FileEntry(bytes=size, sha256=digest.hexdigest())


def encode_state(state: dict[str, Any]) -> bytes:
    """Return ``state`` as the content of ``state.json``."""
    return json.dumps(state, ensure_ascii=False, indent=1).encode()


def _write_pointer(pointer: Path, name: str, *, disk: Disk) -> None:
    part = pointer.with_name(f".{pointer.name}.part")
    if pointer.is_dir() and not pointer.is_symlink():  # not ours: moved aside, not deleted
        disk.rename(pointer, new=_unused_name(pointer))
    disk.write(part, chunks=[f"{name}\n".encode()])
    disk.rename(part, new=pointer)
    disk.sync_dir(pointer.parent)


def _read_pointer(pointer: Path) -> str:
    try:
        return read_text(pointer, POINTER_FILE).strip() if pointer.is_file() else ""
    except CheckpointError:  # not a pointer of ours; the next save replaces it
        return ""


def _unused_name(path: Path) -> Path:
    return next(
        other for i in count(1) if not (other := path.with_name(f"{path.name}.{i}")).exists()
    )


def _delete_oldest(root: Path, *, keep: int, disk: Disk) -> None:
    kept = _read_pointer(root / "best")
    for path in list_checkpoints(root)[max(keep, 1) :]:
        if path.name != kept:
            _delete_checkpoint(path, disk=disk)


def _delete_checkpoint(path: Path, *, disk: Disk) -> None:
    hidden = path.with_name(f".{path.name}.gone")  # a visible directory is always complete
    disk.rename(path, new=hidden)
    disk.remove(hidden)


def _serial_number(directory: Path) -> int:
    try:
        return read_manifest(directory).serial
    except CheckpointError:
        return 0
