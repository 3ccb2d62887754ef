"""Publish: a checkpoint becomes visible by one rename, after all of it is on the medium.

Order: write ``.step-N.part/``, sync, rename to ``step-N/``, move ``best`` if it is, move ``latest``
last, then drop old ones. A machine that dies anywhere in this leaves every earlier checkpoint
whole, and at most a hidden directory that the next save removes. One job saves into a root.
"""

import errno
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moesaic.checkpoint.disk import Disk, Buffer
from moesaic.checkpoint.manifest import MANIFEST_FILE, FileEntry, Manifest, read_manifest
from moesaic.core.errors import CheckpointError
from moesaic.core.units import show_bytes

STEP_DIRECTORY = re.compile(r"step-(\d{8,})(\.replaced)?")
STATE_FILE = "state.json"
OVERHEAD_BYTES = 1 << 20  # headers, manifest and the blocks that a file system rounds up to


@dataclass(frozen=True, slots=True)
class CheckpointPaths:
    """Where a step is written and where it is seen. ``needed`` bytes are asked of the disk."""

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
        """Clear what an interrupted save left, and return the serial number of the new one.

        Raises OSError if the disk has no room.
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
        """Return what a user should know of a disk that refused; ``who`` is e.g. ``on rank 3``."""
        free = "unknown"
        with suppress(OSError):
            free = show_bytes(disk.free_bytes(self.root))
        full = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
        if error.errno in full:
            why = f"{full[error.errno]}: it needs {show_bytes(self.required_bytes)}, free are {free}"
            way_out = "Free some space, keep fewer checkpoints, or use another directory."
        else:
            why = error.strerror or str(error)
            way_out = "Check that the directory can be written, or use another one."
        where = f" {rank}" if rank else ""
        return CheckpointError(
            f"{self.final}: saving failed{where}, {why}. Earlier checkpoints are intact. {way_out}"
        )

    def remove_staging(self, disk: Disk) -> None:
        """Drop what was written of a save that failed."""
        with suppress(OSError):
            disk.remove(self.staging)


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """The newest ``newest`` checkpoints stay, and the one last saved as the ``best``."""

    num_newest: int = 3
    best: bool = False


@dataclass(frozen=True, slots=True)
class CheckpointMetadata:
    """What a checkpoint says beside its tensors (see ``Snapshot``); ``state`` as in its file."""

    step: int
    state: bytes
    expert_parameters: Mapping[str, int]
    plan: Mapping[str, Any]


def write_manifest(
    paths: CheckpointPaths, *, metadata: CheckpointMetadata, serial: int, entries: Mapping[str, FileEntry], disk: Disk
) -> None:
    """Write state and manifest of a part whose other files (``entries``) are written."""
    files = {**entries, STATE_FILE: write_hashed(paths.staging / STATE_FILE, [metadata.state], disk=disk)}
    manifest = Manifest(
        metadata.step, serial, files, _package_versions(), expert_parameters=dict(metadata.expert_parameters), plan=dict(metadata.plan)
    )
    disk.write(paths.staging / MANIFEST_FILE, chunks=[manifest.to_json().encode()])
    disk.sync_dir(paths.staging)


def publish_checkpoint(paths: CheckpointPaths, *, retention: RetentionPolicy, disk: Disk) -> None:
    """Make a part that is whole and on the medium visible, point at it and drop the oldest."""
    final = paths.final
    replaced = final.with_name(final.name + ".replaced")
    if final.exists():  # saved before, then resumed from earlier: the old one stays loadable
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


def list_checkpoints(root: Path) -> list[Path]:
    """Return the visible checkpoint directories, newest first; one without a manifest comes last.

    Newest is the highest serial number, which survives going back to an earlier step.
    """
    found = [p for p in root.glob("step-*") if p.is_dir() and STEP_DIRECTORY.fullmatch(p.name)]
    return sorted(found, key=lambda p: (_serial_number(p), not p.name.endswith(".replaced"), p.name))[::-1]


def write_hashed(path: Path, chunks: Iterable[Buffer], *, disk: Disk) -> FileEntry:
    """Write a file and return its size and hash, from the bytes as they passed."""
    digest, size = hashlib.sha256(), 0

    def passing() -> Iterator[Buffer]:
        nonlocal size
        for piece in chunks:
            digest.update(piece)
            size += len(piece)
            yield piece

    disk.write(path, chunks=passing())
    return FileEntry(size, digest.hexdigest())


def encode_state(state: dict[str, Any]) -> bytes:
    """Return the content of the file of plain values."""
    return json.dumps(state, ensure_ascii=False, indent=1).encode()


def _package_versions() -> dict[str, str]:
    return {name: version(name) for name in ("moesaic", "torch", "safetensors")}


def _write_pointer(pointer: Path, name: str, *, disk: Disk) -> None:
    part = pointer.with_name(f".{pointer.name}.part")
    disk.write(part, chunks=[f"{name}\n".encode()])
    disk.rename(part, new=pointer)
    disk.sync_dir(pointer.parent)


def _delete_oldest(root: Path, *, keep: int, disk: Disk) -> None:
    best = root / "best"
    kept = best.read_text().strip() if best.is_file() else ""
    for path in list_checkpoints(root)[max(keep, 1) :]:
        if path.name != kept:
            _delete_checkpoint(path, disk=disk)


def _delete_checkpoint(path: Path, *, disk: Disk) -> None:
    gone = path.with_name(f".{path.name}.gone")  # hidden first: a visible one is never half removed
    disk.rename(path, new=gone)
    disk.remove(gone)


def _serial_number(directory: Path) -> int:
    try:
        return read_manifest(directory).serial
    except CheckpointError:
        return 0
