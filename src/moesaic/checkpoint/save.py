"""Save: everything a run needs to go on, in one directory, written by one process.

``publish.py`` has the order of writing; ``sharded.py`` is the same by many ranks.
"""

from pathlib import Path

from moesaic.checkpoint.disk import Disk, tensor_bytes
from moesaic.checkpoint.publish import (
    SLACK_BYTES,
    Head,
    Keep,
    Place,
    complete,
    publish,
    state_text,
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
    head = Head(snapshot.step, state_text(snapshot.state), snapshot.banks, snapshot.plan)
    try:
        serial = place.begin(disk)
        entries = {}
        for name, tensors in snapshot.files.items():
            path = place.part / f"{name}.safetensors"
            entries[path.name] = write_hashed(path, tensor_pieces(tensors), disk=disk)
        complete(place, head=head, serial=serial, entries=entries, disk=disk)
        publish(place, keep=Keep(keep, best), disk=disk)
    except OSError as error:
        place.clean(disk)
        raise place.failure(error, disk=disk) from error
    return place.final


def snapshot_bytes(snapshot: Snapshot) -> int:
    """Bytes that saving asks of the disk."""
    data = sum(tensor_bytes(tensors.values()) for tensors in snapshot.files.values())
    return data + SLACK_BYTES
