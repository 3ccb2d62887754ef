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

from moesaic.checkpoint.disk import Disk, Piece
from moesaic.checkpoint.manifest import MANIFEST, FileEntry, Manifest, read_manifest
from moesaic.core.errors import CheckpointError
from moesaic.core.units import show_bytes

STEP_DIR = re.compile(r"step-(\d{8,})(\.replaced)?")
STATE = "state.json"
SLACK_BYTES = 1 << 20  # headers, manifest and the blocks that a file system rounds up to


@dataclass(frozen=True, slots=True)
class Place:
    """Where a step is written and where it is seen. ``needed`` bytes are asked of the disk."""

    root: Path
    step: int
    needed: int

    @property
    def final(self) -> Path:
        return self.root / f"step-{self.step:08d}"

    @property
    def part(self) -> Path:
        return self.root / f".{self.final.name}.part"

    def begin(self, disk: Disk) -> int:
        """Clear what an interrupted save left, and return the serial number of the new one.

        Raises OSError if the disk has no room.
        """
        disk.make_dir(self.root)
        for path in [*self.root.glob(".*.part"), *self.root.glob(".*.gone")]:
            disk.remove(path)
        if disk.free_bytes(self.root) < self.needed:
            raise OSError(errno.ENOSPC, "No space left on device")
        serial = 1 + max((_serial(p) for p in checkpoints(self.root)), default=0)
        disk.make_dir(self.part)
        return serial

    def failure(self, error: OSError, *, disk: Disk, who: str = "") -> CheckpointError:
        """Return what a user should know of a disk that refused; ``who`` is e.g. ``on rank 3``."""
        free = "unknown"
        with suppress(OSError):
            free = show_bytes(disk.free_bytes(self.root))
        full = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
        if error.errno in full:
            why = f"{full[error.errno]}: it needs {show_bytes(self.needed)}, free are {free}"
            way_out = "Free some space, keep fewer checkpoints, or use another directory."
        else:
            why = error.strerror or str(error)
            way_out = "Check that the directory can be written, or use another one."
        where = f" {who}" if who else ""
        return CheckpointError(
            f"{self.final}: saving failed{where}, {why}. Earlier checkpoints are intact. {way_out}"
        )

    def clean(self, disk: Disk) -> None:
        """Drop what was written of a save that failed."""
        with suppress(OSError):
            disk.remove(self.part)


@dataclass(frozen=True, slots=True)
class Keep:
    """The newest ``newest`` checkpoints stay, and the one last saved as the ``best``."""

    newest: int = 3
    best: bool = False


@dataclass(frozen=True, slots=True)
class Head:
    """What a checkpoint says beside its tensors (see ``Snapshot``); ``state`` as in its file."""

    step: int
    state: bytes
    banks: Mapping[str, int]
    plan: Mapping[str, Any]


def complete(
    place: Place, *, head: Head, serial: int, entries: Mapping[str, FileEntry], disk: Disk
) -> None:
    """Write state and manifest of a part whose other files (``entries``) are written."""
    files = {**entries, STATE: write_hashed(place.part / STATE, [head.state], disk=disk)}
    manifest = Manifest(
        head.step, serial, files, _versions(), banks=dict(head.banks), plan=dict(head.plan)
    )
    disk.write(place.part / MANIFEST, pieces=[manifest.text().encode()])
    disk.sync_dir(place.part)


def publish(place: Place, *, keep: Keep, disk: Disk) -> None:
    """Make a part that is whole and on the medium visible, point at it and drop the oldest."""
    final = place.final
    replaced = final.with_name(final.name + ".replaced")
    if final.exists():  # saved before, then resumed from earlier: the old one stays loadable
        if replaced.exists():
            _discard(replaced, disk=disk)
        disk.rename(final, new=replaced)
    disk.rename(place.part, new=final)
    disk.sync_dir(place.root)
    if replaced.exists():
        _discard(replaced, disk=disk)
    for pointer in ["best"] * keep.best + ["latest"]:
        _point(place.root / pointer, final.name, disk=disk)
    _prune(place.root, keep=keep.newest, disk=disk)


def checkpoints(root: Path) -> list[Path]:
    """Return the visible checkpoint directories, newest first; one without a manifest comes last.

    Newest is the highest serial number, which survives going back to an earlier step.
    """
    found = [p for p in root.glob("step-*") if p.is_dir() and STEP_DIR.fullmatch(p.name)]
    return sorted(found, key=lambda p: (_serial(p), not p.name.endswith(".replaced"), p.name))[::-1]


def write_hashed(path: Path, pieces: Iterable[Piece], *, disk: Disk) -> FileEntry:
    """Write a file and return its size and hash, from the bytes as they passed."""
    digest, size = hashlib.sha256(), 0

    def passing() -> Iterator[Piece]:
        nonlocal size
        for piece in pieces:
            digest.update(piece)
            size += len(piece)
            yield piece

    disk.write(path, pieces=passing())
    return FileEntry(size, digest.hexdigest())


def state_text(state: dict[str, Any]) -> bytes:
    """Return the content of the file of plain values."""
    return json.dumps(state, ensure_ascii=False, indent=1).encode()


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("moesaic", "torch", "safetensors")}


def _point(pointer: Path, name: str, *, disk: Disk) -> None:
    part = pointer.with_name(f".{pointer.name}.part")
    disk.write(part, pieces=[f"{name}\n".encode()])
    disk.rename(part, new=pointer)
    disk.sync_dir(pointer.parent)


def _prune(root: Path, *, keep: int, disk: Disk) -> None:
    best = root / "best"
    kept = best.read_text().strip() if best.is_file() else ""
    for path in checkpoints(root)[max(keep, 1) :]:
        if path.name != kept:
            _discard(path, disk=disk)


def _discard(path: Path, *, disk: Disk) -> None:
    gone = path.with_name(f".{path.name}.gone")  # hidden first: a visible one is never half removed
    disk.rename(path, new=gone)
    disk.remove(gone)


def _serial(directory: Path) -> int:
    try:
        return read_manifest(directory).serial
    except CheckpointError:
        return 0
