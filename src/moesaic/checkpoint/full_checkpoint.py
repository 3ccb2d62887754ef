"""Full checkpoint: saved by one process, loaded whole from either form after verification.

``checkpoint_directory.py`` has the order of writing; ``sharded_checkpoint.py`` is for many ranks.
"""

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.checkpoint.block_index import read_index
from moesaic.checkpoint.checkpoint_directory import (
    OVERHEAD_BYTES,
    STATE_FILE,
    STEP_DIRECTORY,
    CheckpointMetadata,
    CheckpointPaths,
    Disk,
    RetentionPolicy,
    encode_state,
    list_checkpoints,
    write_checkpoint,
    write_hashed,
)
from moesaic.checkpoint.manifest import (
    file_problems,
    raise_if_damaged,
    read_manifest,
    verify_checkpoint,
)
from moesaic.checkpoint.safetensors_io import serialize_tensors
from moesaic.checkpoint.snapshot import Snapshot
from moesaic.checkpoint.stored_weights import open_weights, reject_pickles
from moesaic.checkpoint.tensor_reader import open_reader
from moesaic.core.config_text import iter_leaves
from moesaic.core.config_upgrade import upgrade_config
from moesaic.core.errors import CheckpointError, UserError
from moesaic.core.file_reader import MIB, FileEntry, FileKind, read_json_mapping
from moesaic.core.shapes import Tensor

MAX_SHOWN_DIFFERENCES = 8
STATE_KIND = FileKind(name="state of a checkpoint", max_bytes=256 * MIB, error=CheckpointError)


def config_differences(
    saved: Mapping[str, Any], current: Mapping[str, Any]
) -> dict[str, tuple[str, str]]:
    """Return ``{path: (saved, current)}`` of two plain configs; "-" where one has no value."""
    old = {path: str(value) for path, value in iter_leaves(dict(saved), "")}
    new = {path: str(value) for path, value in iter_leaves(dict(current), "")}
    paths = [*old, *(p for p in new if p not in old)]
    return {p: (old.get(p, "-"), new.get(p, "-")) for p in paths if old.get(p) != new.get(p)}


def require_same_config(
    saved: Mapping[str, Any],
    *,
    current: Mapping[str, Any],
    where: Path,
    ignored: Iterable[str] = (),
) -> None:
    """Raise CheckpointError unless the two plain configs agree.

    ``ignored`` are paths (``steps``, ``log``: with everything under them) that may change on
    resume.
    """
    ignored = tuple(ignored)
    wrong = {
        path: values
        for path, values in config_differences(saved, current).items()
        if not any(path == f or path.startswith(f + ".") for f in ignored)
    }
    if wrong:
        lines = [
            f"{path}: {old} in the checkpoint, {new} now" for path, (old, new) in wrong.items()
        ]
        shown, rest = lines[:MAX_SHOWN_DIFFERENCES], len(lines) - MAX_SHOWN_DIFFERENCES
        more = f"; and {rest} more" if rest > 0 else ""
        raise CheckpointError(
            f"{where} was saved with another config: {'; '.join(shown)}{more}. "
            "Resume with the config of the run, or train into a new directory."
        )


def save_checkpoint(
    root: Path, snapshot: Snapshot, *, keep: int = 3, best: bool = False, disk: Disk | None = None
) -> Path:
    """Write ``root/step-N`` atomically, and return it.

    Keeps the newest ``keep`` checkpoints and the one last saved with ``best``. Raises
    CheckpointError on a disk error (if it is full, with the bytes needed and free); then nothing of
    the new checkpoint is left and the earlier ones are unchanged.
    """
    disk = disk or Disk()
    size = sum(t.numel() * t.element_size() for f in snapshot.files.values() for t in f.values())

    def write_files(directory: Path) -> dict[str, FileEntry]:
        entries = {}
        for name, tensors in snapshot.files.items():
            path = directory / f"{name}.safetensors"
            entries[path.name] = write_hashed(path, serialize_tensors(tensors), disk=disk)
        return entries

    return write_checkpoint(
        CheckpointPaths(root, snapshot.step, size + OVERHEAD_BYTES),
        metadata=CheckpointMetadata(
            snapshot.step, encode_state(snapshot.state), snapshot.expert_parameters, snapshot.plan
        ),
        retention=RetentionPolicy(keep, best),
        disk=disk,
        write_files=write_files,
    )


@dataclass(frozen=True, slots=True)
class LatestCheckpoint:
    """The newest valid checkpoint, or None, and why each newer one was skipped."""

    path: Path | None
    skipped: tuple[str, ...] = ()


def find_latest_checkpoint(root: Path) -> LatestCheckpoint:
    """Find the newest checkpoint under ``root`` that passes verification."""
    skipped = []
    for path in list_checkpoints(root):
        try:
            reject_pickles(path)
            verify_checkpoint(path)
            return LatestCheckpoint(path, (*skipped, *unreadable_after(path)))
        except UserError as error:
            skipped.append(str(error))
    return LatestCheckpoint(None, tuple(skipped))


def unreadable_after(path: Path) -> Iterator[str]:
    """Yield why checkpoints of later steps, whose manifests cannot be read, are not newer."""
    for other in list_checkpoints(path.parent):
        if other.name <= path.name:
            continue
        try:
            read_manifest(other)
        except UserError as error:
            yield str(error)


def load_checkpoint(path: Path, *, only: Container[str] | None = None) -> Snapshot:
    """Load a checkpoint directory of either form, or the newest valid one of a root.

    ``only`` names the kinds of file to read (``model``, ``random``); None reads all. Raises
    CheckpointError naming each missing, truncated or altered file, a pickle, or a tensor that the
    shards do not cover.
    """
    directory = path if STEP_DIRECTORY.fullmatch(path.name) else _require_latest(path)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such checkpoint{list_available(directory.parent)}")
    reject_pickles(directory)
    verify_checkpoint(directory)
    return read_snapshot(directory, only=only)


def read_snapshot(directory: Path, *, only: Container[str] | None = None) -> Snapshot:
    """Load a checkpoint that has been verified."""
    manifest = read_manifest(directory)
    index = read_index(directory, manifest=manifest)
    with open_reader(directory) as reader:
        files = {
            file: {name: reader.read_tensor(stored) for name, stored in tensors.items()}
            for file, tensors in index.files.items()
            if only is None or file in only
        }
    return Snapshot(
        step=manifest.step,
        files=files,
        state=read_verified_state(directory),
        expert_parameters=manifest.expert_parameters,
        plan=manifest.plan,
    )


def read_weights(path: Path, *, device: str = "cpu") -> dict[str, Tensor]:
    """Read the weights of a safetensors file, or of a checkpoint directory of either form.

    Hashes are not checked. Raises CheckpointError if it is missing, truncated or a pickle.
    """
    with open_weights(path) as stored:
        tensors = stored.tensors.items()
        return {name: stored.reader.read_tensor(each).to(device) for name, each in tensors}


def read_state(directory: Path) -> dict[str, Any]:
    """Read the JSON state of a checkpoint only.

    Raises CheckpointError if that file is missing or altered.
    """
    manifest = read_manifest(directory)
    raise_if_damaged(directory, file_problems(directory, manifest=manifest, names=[STATE_FILE]))
    return read_verified_state(directory)


def read_verified_state(directory: Path) -> dict[str, Any]:
    """Read the JSON state of a checkpoint whose files have been hashed."""
    state = read_json_mapping(directory / STATE_FILE, STATE_KIND)
    if read_manifest(directory).format > 1:
        return state
    if "config" in state:
        state["config"], _ = upgrade_config(state["config"])
    if "journal" in state:
        state["events"] = state.pop("journal")
    if isinstance(state.get("data"), dict):
        state["data"].pop("fingerprint", None)  # a hash of the previous names
    return state


def _require_latest(root: Path) -> Path:
    latest = find_latest_checkpoint(root)
    if latest.path is None:
        why = f": {' | '.join(latest.skipped)}" if latest.skipped else ""
        raise CheckpointError(f"{root}: no valid checkpoint in it{why}")
    return latest.path


def list_available(root: Path) -> str:
    """Return the end of a sentence on a checkpoint that is missing: those that ``root`` has."""
    names = [p.name for p in list_checkpoints(root)] if root.is_dir() else []
    return f"; {root} has {', '.join(names)}" if names else f"; {root} has none"
