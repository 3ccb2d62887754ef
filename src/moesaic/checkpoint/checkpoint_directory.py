"""Disk: the few operations that saving is made of, each one a place where a machine can die.

Manifest: what a checkpoint directory must hold, with size and hash of every file.

``manifest.json`` is written last inside the directory and carries a digest of itself. ``serial``
counts the saves of a root: a run that went back to an earlier step is newer by serial, not by step.

Publish: a checkpoint becomes visible by one rename, after all of it is on the medium.

Order: write ``.step-N.part/``, sync, rename to ``step-N/``, move ``best`` if it is, move ``find_latest_checkpoint``
last, then drop old ones. A machine that dies anywhere in this leaves every earlier checkpoint
whole, and at most a hidden directory that the next save removes. One job saves into a root.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moesaic.core.errors import CheckpointError
from moesaic.core.files import sha256
from moesaic.core.shapes import Tensor
from moesaic.core.units import show_bytes

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


MANIFEST_FILE = "manifest.json"


MANIFEST_FORMAT = 1


HASH_THREADS = 8  # a file system of many machines is quicker so


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """``files`` by name, and which versions wrote them; ``banks`` and ``plan`` as in a snapshot."""

    step: int
    serial: int
    files: dict[str, FileEntry]
    versions: dict[str, str]
    expert_parameters: dict[str, int] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        body = {"format": MANIFEST_FORMAT, **asdict(self)}
        body["banks"] = body.pop("expert_parameters")  # the key of format 1
        return json.dumps(body | {"digest": _digest(body)}, indent=1) + "\n"


def read_manifest(directory: Path) -> Manifest:
    """Read and check ``directory/manifest.json``. Raises CheckpointError."""
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, so the checkpoint is incomplete")
    try:
        body: dict[str, Any] = json.loads(path.read_bytes())
        digest = body.pop("digest")
        if digest != _digest(body):
            raise CheckpointError(f"{path}: altered, its content does not match its digest")
        if body.pop("format") != MANIFEST_FORMAT:
            raise CheckpointError(f"{path}: written by another version of moesaic")
        files = {name: FileEntry(**entry) for name, entry in body.pop("files").items()}
        return Manifest(files=files, expert_parameters=body.pop("banks"), **body)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error


def verify_checkpoint(directory: Path) -> Manifest:
    """Hash every file of a checkpoint against its manifest.

    Raises CheckpointError that names each file that is missing, truncated or altered.
    """
    manifest = read_manifest(directory)
    raise_if_damaged(directory, file_problems(directory, manifest=manifest, names=manifest.files))
    return manifest


def file_problems(directory: Path, *, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Hash some files of a checkpoint, several at a time, and return what is wrong with them."""

    def problem(name: str) -> str:
        return _file_problem(directory / name, entry=manifest.files[name])

    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return [found for found in pool.map(problem, names) if found]


def _file_problem(path: Path, *, entry: FileEntry) -> str:
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != entry.bytes:
        word = "truncated" if size < entry.bytes else "too long"
        return f"{path.name} is {word}: {size} bytes, expected {entry.bytes}"
    if sha256(path) != entry.sha256:
        return f"{path.name} was altered: its hash is not the one in {MANIFEST_FILE}"
    return ""


def raise_if_damaged(directory: Path, found: Iterable[str]) -> None:
    """Raise CheckpointError if something was found wrong."""
    if text := "; ".join(found):
        raise CheckpointError(
            f"{directory}: {text}. Resume from another checkpoint beside it, or restore the file."
        )


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


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
            why = (
                f"{full[error.errno]}: it needs {show_bytes(self.required_bytes)}, free are {free}"
            )
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
    paths: CheckpointPaths,
    *,
    metadata: CheckpointMetadata,
    serial: int,
    entries: Mapping[str, FileEntry],
    disk: Disk,
) -> None:
    """Write state and manifest of a part whose other files (``entries``) are written."""
    files = {
        **entries,
        STATE_FILE: write_hashed(paths.staging / STATE_FILE, [metadata.state], disk=disk),
    }
    manifest = Manifest(
        metadata.step,
        serial,
        files,
        _package_versions(),
        expert_parameters=dict(metadata.expert_parameters),
        plan=dict(metadata.plan),
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
    return sorted(
        found, key=lambda p: (_serial_number(p), not p.name.endswith(".replaced"), p.name)
    )[::-1]


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
