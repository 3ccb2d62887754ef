"""Save: everything a run needs to go on, in one directory, written by one process.

``publish.py`` has the order of writing; ``sharded.py`` is the same by many ranks.
"""

import json
from pathlib import Path

from moesaic.checkpoint.disk import Disk, tensor_bytes
from moesaic.checkpoint.manifest import MANIFEST, Manifest
from moesaic.checkpoint.publish import (
    SLACK_BYTES,
    STATE,
    Keep,
    Place,
    publish,
    versions,
    write_hashed,
)
from moesaic.checkpoint.snapshot import Snapshot
from moesaic.checkpoint.tensors import tensor_pieces


def save(
    root: Path, snapshot: Snapshot, *, keep: int = 3, best: bool = False, disk: Disk | None = None
) -> Path:
    """Write ``root/step-N`` whole or not at all, and return it.

    Keeps the newest ``keep`` checkpoints and the one last saved with ``best``. Raises
    CheckpointError if the disk refuses (full: with the bytes needed and free); then nothing of the
    new checkpoint is left and the earlier ones are as they were.
    """
    disk = disk or Disk()
    place = Place(root, snapshot.step, snapshot_bytes(snapshot))
    try:
        serial = place.begin(disk)
        _write_part(place.part, snapshot, serial=serial, disk=disk)
        publish(place, keep=Keep(keep, best), disk=disk)
    except OSError as error:
        place.clean(disk)
        raise place.failure(error, disk=disk) from error
    return place.final


def snapshot_bytes(snapshot: Snapshot) -> int:
    """Bytes that saving asks of the disk."""
    data = sum(tensor_bytes(tensors.values()) for tensors in snapshot.files.values())
    return data + SLACK_BYTES


def _write_part(part: Path, snapshot: Snapshot, *, serial: int, disk: Disk) -> None:
    entries = {}
    for name, tensors in snapshot.files.items():
        path = part / f"{name}.safetensors"
        entries[path.name] = write_hashed(path, tensor_pieces(tensors), disk=disk)
    entries[STATE] = write_hashed(part / STATE, [state_text(snapshot.state)], disk=disk)
    manifest = Manifest(
        snapshot.step,
        serial,
        entries,
        versions(),
        banks=dict(snapshot.banks),
        plan=dict(snapshot.plan),
    )
    disk.write(part / MANIFEST, pieces=[manifest.text().encode()])
    disk.sync_dir(part)


def state_text(state: dict[str, object]) -> bytes:
    """Return the content of ``state.json``."""
    return json.dumps(state, ensure_ascii=False, indent=1).encode()
