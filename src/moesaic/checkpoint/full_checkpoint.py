"""Whether a checkpoint belongs to a config: every key that differs is named with both values.

Save: everything a run needs to go on, in one directory, written by one process.

``publish.py`` has the order of writing; ``sharded.py`` is the same by many ranks.

Load: a checkpoint is verified before any of it is believed, and never half loaded.
"""

import json
from collections.abc import Container, Iterable, Mapping
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
    file_problems,
    list_checkpoints,
    publish_checkpoint,
    raise_if_damaged,
    read_manifest,
    tensor_bytes,
    verify_checkpoint,
    write_hashed,
    write_manifest,
)
from moesaic.checkpoint.safetensors_io import check_tensor_file, read_tensors, serialize_tensors
from moesaic.checkpoint.snapshot import Snapshot
from moesaic.checkpoint.tensor_reader import open_reader
from moesaic.core.config_text import iter_leaves
from moesaic.core.errors import CheckpointError
from moesaic.core.shapes import Tensor

MAX_SHOWN_DIFFERENCES = 8


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

    ``free`` are paths (``steps``, ``log``: with all that is under them) that may change on resume.
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
        more = (
            f"; and {len(lines) - MAX_SHOWN_DIFFERENCES} more"
            if len(lines) > MAX_SHOWN_DIFFERENCES
            else ""
        )
        raise CheckpointError(
            f"{where} was saved with another config: {'; '.join(lines[:MAX_SHOWN_DIFFERENCES])}{more}. "
            "Resume with the config of the run, or train into a new directory."
        )


def save_checkpoint(
    root: Path, snapshot: Snapshot, *, keep: int = 3, best: bool = False, disk: Disk | None = None
) -> Path:
    """Write ``root/step-N`` whole or not at all, and return it.

    Keeps the newest ``keep`` checkpoints and the one last saved with ``best``. Raises
    CheckpointError if the disk refuses (full: with the bytes needed and free); then nothing of the
    new checkpoint is left and the earlier ones are as they were.
    """
    disk = disk or Disk()
    place = CheckpointPaths(root, snapshot.step, snapshot_bytes(snapshot))
    head = CheckpointMetadata(
        snapshot.step, encode_state(snapshot.state), snapshot.expert_parameters, snapshot.plan
    )
    try:
        serial = place.create_staging(disk)
        entries = {}
        for name, tensors in snapshot.files.items():
            path = place.staging / f"{name}.safetensors"
            entries[path.name] = write_hashed(path, serialize_tensors(tensors), disk=disk)
        write_manifest(place, metadata=head, serial=serial, entries=entries, disk=disk)
        publish_checkpoint(place, retention=RetentionPolicy(keep, best), disk=disk)
    except OSError as error:
        place.remove_staging(disk)
        raise place.disk_error(error, disk=disk) from error
    return place.final


def snapshot_bytes(snapshot: Snapshot) -> int:
    """Bytes that saving asks of the disk."""
    data = sum(tensor_bytes(tensors.values()) for tensors in snapshot.files.values())
    return data + OVERHEAD_BYTES


@dataclass(frozen=True, slots=True)
class LatestCheckpoint:
    """The newest valid checkpoint, or None, and a sentence for each newer one that was skipped."""

    path: Path | None
    skipped: tuple[str, ...] = ()


def find_latest_checkpoint(root: Path) -> LatestCheckpoint:
    """Find the newest checkpoint under ``root`` that verifies."""
    skipped = []
    for path in list_checkpoints(root):
        try:
            _reject_pickles(path)
            verify_checkpoint(path)
            return LatestCheckpoint(path, tuple(skipped))
        except CheckpointError as error:
            skipped.append(str(error))
    return LatestCheckpoint(None, tuple(skipped))


def load_checkpoint(path: Path, *, only: Container[str] | None = None) -> Snapshot:
    """Read a checkpoint directory, or the newest valid one of a root: of either form, whole.

    ``only`` names the kinds of file to read (``model``, ``random``); None reads all. Raises
    CheckpointError naming each missing, truncated or altered file, a pickle, or a tensor that the
    shards do not make up.
    """
    directory = path if STEP_DIRECTORY.fullmatch(path.name) else _require_latest(path)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such checkpoint{_list_available(directory.parent)}")
    _reject_pickles(directory)
    verify_checkpoint(directory)
    return read_snapshot(directory, only=only)


def read_snapshot(directory: Path, *, only: Container[str] | None = None) -> Snapshot:
    """Do what ``load`` does with a checkpoint whose hashes have been compared already."""
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
        state=json.loads((directory / STATE_FILE).read_text(encoding="utf-8")),
        expert_parameters=manifest.expert_parameters,
        plan=manifest.plan,
    )


def read_weights(path: Path, *, device: str = "cpu") -> dict[str, Tensor]:
    """Read the weights of a safetensors file, or those of a checkpoint directory of either form.

    Hashes are not compared. Raises CheckpointError if it is missing, cut short or a pickle.
    """
    if not path.is_dir():
        return read_tensors(path, device=device)
    _reject_pickles(path)
    index = read_index(path, manifest=read_manifest(path))
    with open_reader(path) as reader:
        held = index.files.get("model", {}).items()
        return {name: reader.read_tensor(stored).to(device) for name, stored in held}


def read_state(directory: Path) -> dict[str, Any]:
    """Return the plain state of a checkpoint, without a look at its tensors.

    Raises CheckpointError if that file is missing or altered.
    """
    manifest = read_manifest(directory)
    raise_if_damaged(directory, file_problems(directory, manifest=manifest, names=[STATE_FILE]))
    return json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))


def _require_latest(root: Path) -> Path:
    found = find_latest_checkpoint(root)
    if found.path is None:
        why = f": {' | '.join(found.skipped)}" if found.skipped else ""
        raise CheckpointError(f"{root}: no valid checkpoint in it{why}")
    return found.path


def _list_available(root: Path) -> str:
    names = [p.name for p in list_checkpoints(root)] if root.is_dir() else []
    return f"; {root} has {', '.join(names)}" if names else f"; {root} has none"


def _reject_pickles(directory: Path) -> None:
    """Look at the tensor files before hashing: "a pickle" says more than "altered"."""
    for path in sorted(directory.glob("*")):
        if path.suffix == ".safetensors" and path.stat().st_size >= 9:
            _reject_pickle(path)


def _reject_pickle(path: Path) -> None:
    try:
        check_tensor_file(path)
    except CheckpointError as error:
        if "pickle" in str(error):
            raise
