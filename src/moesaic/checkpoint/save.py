"""Save: a checkpoint becomes visible by one rename, after all of it is on the medium.

Order: write ``.step-N.part/``, sync, rename to ``step-N/``, move ``best`` if it is, move ``latest``
last, then drop old ones. A machine that dies anywhere in this leaves every earlier checkpoint
whole, and at most a hidden directory that the next save removes. One process saves into a root.
"""

import errno
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from moesaic.checkpoint.disk import Disk, Piece, tensor_bytes
from moesaic.checkpoint.manifest import MANIFEST, FileEntry, Manifest, read_manifest
from moesaic.checkpoint.snapshot import Snapshot
from moesaic.checkpoint.tensors import tensor_pieces
from moesaic.core.errors import CheckpointError
from moesaic.core.units import show_bytes

STEP_DIR = re.compile(r"step-(\d{8,})(\.replaced)?")
STATE = "state.json"
SLACK_BYTES = 1 << 20  # headers, manifest and the blocks that a file system rounds up to


def save(
    root: Path, snapshot: Snapshot, *, keep: int = 3, best: bool = False, disk: Disk | None = None
) -> Path:
    """Write ``root/step-N`` whole or not at all, and return it.

    Keeps the newest ``keep`` checkpoints and the one last saved with ``best``. Raises
    CheckpointError if the disk refuses (full: with the bytes needed and free); then nothing of the
    new checkpoint is left and the earlier ones are as they were.
    """
    disk = disk or Disk()
    final = root / f"step-{snapshot.step:08d}"
    part = root / f".{final.name}.part"
    needed = snapshot_bytes(snapshot)
    try:
        disk.make_dir(root)
        _remove_left_overs(root, disk=disk)
        if disk.free_bytes(root) < needed:
            raise OSError(errno.ENOSPC, "No space left on device")
        _write_part(part, snapshot, serial=_next_serial(root), disk=disk)
        _publish(part, final, disk=disk)
        for pointer in ["best"] * best + ["latest"]:
            _point(root / pointer, final.name, disk=disk)
        _prune(root, keep=keep, disk=disk)
    except OSError as error:
        raise _failure(error, final=final, part=part, needed=needed, disk=disk) from error
    return final


def snapshot_bytes(snapshot: Snapshot) -> int:
    """Bytes that saving asks of the disk."""
    data = sum(tensor_bytes(tensors.values()) for tensors in snapshot.files.values())
    return data + SLACK_BYTES


def checkpoints(root: Path) -> list[Path]:
    """Return the visible checkpoint directories, newest first; one without a manifest comes last.

    Newest is the highest serial number, which survives going back to an earlier step.
    """
    found = [p for p in root.glob("step-*") if p.is_dir() and STEP_DIR.fullmatch(p.name)]
    return sorted(found, key=lambda p: (_serial(p), not p.name.endswith(".replaced"), p.name))[::-1]


def _write_part(part: Path, snapshot: Snapshot, *, serial: int, disk: Disk) -> None:
    disk.make_dir(part)
    entries = {}
    for name, tensors in snapshot.files.items():
        path = part / f"{name}.safetensors"
        entries[path.name] = _write_hashed(path, tensor_pieces(tensors), disk=disk)
    state = json.dumps(snapshot.state, ensure_ascii=False, indent=1).encode()
    entries[STATE] = _write_hashed(part / STATE, [state], disk=disk)
    versions = {name: version(name) for name in ("moesaic", "torch", "safetensors")}
    manifest = Manifest(snapshot.step, serial, entries, versions)
    disk.write(part / MANIFEST, pieces=[manifest.text().encode()])
    disk.sync_dir(part)


def _write_hashed(path: Path, pieces: Iterable[Piece], *, disk: Disk) -> FileEntry:
    digest, size = hashlib.sha256(), 0

    def passing() -> Iterator[Piece]:
        nonlocal size
        for piece in pieces:
            digest.update(piece)
            size += len(piece)
            yield piece

    disk.write(path, pieces=passing())
    return FileEntry(size, digest.hexdigest())


def _publish(part: Path, final: Path, *, disk: Disk) -> None:
    replaced = final.with_name(final.name + ".replaced")
    if final.exists():  # saved before, then resumed from earlier: the old one stays loadable
        if replaced.exists():
            _discard(replaced, disk=disk)
        disk.rename(final, new=replaced)
    disk.rename(part, new=final)
    disk.sync_dir(final.parent)
    if replaced.exists():
        _discard(replaced, disk=disk)


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


def _remove_left_overs(root: Path, *, disk: Disk) -> None:
    for path in [*root.glob(".*.part"), *root.glob(".*.gone")]:
        disk.remove(path)


def _next_serial(root: Path) -> int:
    return 1 + max((_serial(p) for p in checkpoints(root)), default=0)


def _serial(directory: Path) -> int:
    try:
        return read_manifest(directory).serial
    except CheckpointError:
        return 0


def _failure(
    error: OSError, *, final: Path, part: Path, needed: int, disk: Disk
) -> CheckpointError:
    free = "unknown"
    with suppress(OSError):
        disk.remove(part)
        free = show_bytes(disk.free_bytes(final.parent))
    full = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
    if error.errno in full:
        why = f"{full[error.errno]}: it needs {show_bytes(needed)}, free are {free}"
        way_out = "Free some space, keep fewer checkpoints, or use another directory."
    else:
        why = error.strerror or str(error)
        way_out = "Check that the directory can be written, or use another one."
    return CheckpointError(
        f"{final}: saving failed, {why}. Earlier checkpoints are intact. {way_out}"
    )
