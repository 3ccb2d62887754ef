"""Manifest of a checkpoint: every file with size and hash, checked before any of them is read.

``manifest.json`` is written last and contains its own digest. Its names stay inside the checkpoint
directory; a field of another kind or range makes the checkpoint unusable, with a sentence.
"""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from moesaic.core.config_errors import show_value
from moesaic.core.config_upgrade import current_name
from moesaic.core.errors import CheckpointError
from moesaic.core.file_reader import (
    MIB,
    Count,
    FileEntry,
    FileKind,
    FileShape,
    parse_json,
    parse_shape,
    read_bytes,
    require_inside,
)
from moesaic.core.files import sha256

MANIFEST_FILE = "manifest.json"
MANIFEST_FORMAT = 3  # formats 1 and 2 have other parameter names, see ``current_name``
MANIFEST_KIND = FileKind(name="manifest of a checkpoint", max_bytes=64 * MIB, error=CheckpointError)
MAX_EXPERTS = 1 << 20  # of one layer
HASH_THREADS = 8  # faster on a network file system


class Manifest(FileShape):
    """``files`` by name, package versions; ``expert_parameters`` and ``plan`` as in
    ``Snapshot``."""

    kind: ClassVar[FileKind] = MANIFEST_KIND
    step: Count
    serial: Count
    files: dict[str, FileEntry]
    versions: dict[str, str]
    expert_parameters: dict[str, int] = Field(default_factory=dict)
    plan: dict[str, Any] = Field(default_factory=dict)
    format: int = MANIFEST_FORMAT

    def to_json(self) -> str:
        body = self.model_dump()
        return json.dumps(body | {"digest": _digest(body)}, indent=1) + "\n"


class _FirstManifest(Manifest):
    """A manifest of format 1."""

    banks: dict[str, int] = Field(default_factory=dict)


def read_manifest(directory: Path) -> Manifest:
    """Read and check ``directory/manifest.json``. Raises CheckpointError."""
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, so the checkpoint is incomplete")
    data = read_bytes(path, MANIFEST_KIND)
    body = parse_json(data, kind=MANIFEST_KIND, where=path)
    if not isinstance(body, dict):
        raise CheckpointError(f"{path}: damaged: found {show_value(body)}, expected a mapping")
    digest, version = body.pop("digest", None), body.get("format")
    if digest != _digest(body):
        raise CheckpointError(f"{path}: altered, its content does not match its digest")
    if type(version) is not int or not 1 <= version <= MANIFEST_FORMAT:
        raise CheckpointError(
            f"{path}: format {show_value(version)}, expected at most {MANIFEST_FORMAT}: it is of "
            "a newer version of moesaic; load it with that version"
        )
    found = parse_shape(data, _FirstManifest, kind=MANIFEST_KIND, where=path)
    if version == 1:
        experts = {current_name(name, file_format=1): n for name, n in found.banks.items()}
        found = found.model_copy(update={"expert_parameters": experts})
    for name, count in found.expert_parameters.items():
        if not 0 < count <= MAX_EXPERTS:
            expected = f"expected 1 to {MAX_EXPERTS:,} experts"
            raise CheckpointError(f"{path}: {show_value(name)} has {count}, {expected}")
    for name in found.files:
        require_inside(directory, name, kind=MANIFEST_KIND, where=path)
    return Manifest(**found.model_dump(exclude={"banks"}))


def verify_checkpoint(directory: Path) -> Manifest:
    """Hash every file of a checkpoint against its manifest.

    Raises CheckpointError that names each file that is missing, truncated or altered.
    """
    manifest = read_manifest(directory)
    raise_if_damaged(directory, file_problems(directory, manifest=manifest, names=manifest.files))
    return manifest


def file_problems(directory: Path, *, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Hash some files of a checkpoint in several threads; return what is wrong with them."""

    def problem(name: str) -> str:
        if name not in manifest.files:
            return f"{name} is not in its {MANIFEST_FILE}"
        return file_problem(directory / name, entry=manifest.files[name], listed_in=MANIFEST_FILE)

    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return [text for text in pool.map(problem, names) if text]


def file_problem(path: Path, *, entry: FileEntry, listed_in: str) -> str:
    """Return how a file differs from its entry in the file ``listed_in``, or nothing."""
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != entry.bytes:
        word = "truncated" if size < entry.bytes else "too long"
        return f"{path.name} is {word}: {size} bytes, expected {entry.bytes}"
    if sha256(path) != entry.sha256:
        return f"{path.name} was altered: its hash is not the one in {listed_in}"
    return ""


def raise_if_damaged(directory: Path, problems: Iterable[str]) -> None:
    """Raise CheckpointError if there are problems."""
    if text := "; ".join(problems):
        raise CheckpointError(
            f"{directory}: {text}. Resume from another checkpoint of the run, or restore the file."
        )


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
