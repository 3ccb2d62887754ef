"""Load: a checkpoint is verified before any of it is believed, and never half loaded."""

import json
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.checkpoint.index import read_index
from moesaic.checkpoint.manifest import problems, read_manifest, refuse, verify
from moesaic.checkpoint.publish import STATE, STEP_DIR, checkpoints
from moesaic.checkpoint.reader import reading
from moesaic.checkpoint.snapshot import Snapshot
from moesaic.checkpoint.tensors import check_tensor_file, read_tensors
from moesaic.core.errors import CheckpointError
from moesaic.core.shapes import Tensor


@dataclass(frozen=True, slots=True)
class Latest:
    """The newest valid checkpoint, or None, and a sentence for each newer one that was skipped."""

    path: Path | None
    skipped: tuple[str, ...] = ()


def latest(root: Path) -> Latest:
    """Find the newest checkpoint under ``root`` that verifies."""
    skipped = []
    for path in checkpoints(root):
        try:
            _refuse_pickles(path)
            verify(path)
            return Latest(path, tuple(skipped))
        except CheckpointError as error:
            skipped.append(str(error))
    return Latest(None, tuple(skipped))


def load(path: Path, *, only: Container[str] | None = None) -> Snapshot:
    """Read a checkpoint directory, or the newest valid one of a root: of either form, whole.

    ``only`` names the kinds of file to read (``model``, ``random``); None reads all. Raises
    CheckpointError naming each missing, truncated or altered file, a pickle, or a tensor that the
    shards do not make up.
    """
    directory = path if STEP_DIR.fullmatch(path.name) else _newest(path)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such checkpoint{_beside(directory.parent)}")
    _refuse_pickles(directory)
    verify(directory)
    return read_snapshot(directory, only=only)


def read_snapshot(directory: Path, *, only: Container[str] | None = None) -> Snapshot:
    """Do what ``load`` does with a checkpoint whose hashes have been compared already."""
    manifest = read_manifest(directory)
    index = read_index(directory, manifest=manifest)
    with reading(directory) as reader:
        files = {
            file: {name: reader.tensor(stored) for name, stored in tensors.items()}
            for file, tensors in index.files.items()
            if only is None or file in only
        }
    return Snapshot(
        step=manifest.step,
        files=files,
        state=json.loads((directory / STATE).read_text(encoding="utf-8")),
        banks=manifest.banks,
        plan=manifest.plan,
    )


def read_weights(path: Path, *, device: str = "cpu") -> dict[str, Tensor]:
    """Read the weights of a safetensors file, or those of a checkpoint directory of either form.

    Hashes are not compared. Raises CheckpointError if it is missing, cut short or a pickle.
    """
    if not path.is_dir():
        return read_tensors(path, device=device)
    _refuse_pickles(path)
    index = read_index(path, manifest=read_manifest(path))
    with reading(path) as reader:
        held = index.files.get("model", {}).items()
        return {name: reader.tensor(stored).to(device) for name, stored in held}


def read_state(directory: Path) -> dict[str, Any]:
    """Return the plain state of a checkpoint, without a look at its tensors.

    Raises CheckpointError if that file is missing or altered.
    """
    manifest = read_manifest(directory)
    refuse(directory, problems(directory, manifest=manifest, names=[STATE]))
    return json.loads((directory / STATE).read_text(encoding="utf-8"))


def _newest(root: Path) -> Path:
    found = latest(root)
    if found.path is None:
        why = f": {' | '.join(found.skipped)}" if found.skipped else ""
        raise CheckpointError(f"{root}: no valid checkpoint in it{why}")
    return found.path


def _beside(root: Path) -> str:
    names = [p.name for p in checkpoints(root)] if root.is_dir() else []
    return f"; {root} has {', '.join(names)}" if names else f"; {root} has none"


def _refuse_pickles(directory: Path) -> None:
    """Look at the tensor files before hashing: "a pickle" says more than "altered"."""
    for path in sorted(directory.glob("*")):
        if path.suffix == ".safetensors" and path.stat().st_size >= 9:
            _refuse_pickle(path)


def _refuse_pickle(path: Path) -> None:
    try:
        check_tensor_file(path)
    except CheckpointError as error:
        if "pickle" in str(error):
            raise
