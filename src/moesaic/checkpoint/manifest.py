"""Manifest: what a checkpoint directory must hold, with size and hash of every file.

``manifest.json`` is written last inside the directory and carries a digest of itself. ``serial``
counts the saves of a root: a run that went back to an earlier step is newer by serial, not by step.
"""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moesaic.core.errors import CheckpointError
from moesaic.core.files import sha256

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
        return Manifest(files=files, **body)
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
