"""Save: everything a run needs to go on, in one directory, written by one process.

``publish.py`` has the order of writing; ``sharded.py`` is the same by many ranks.
"""

from pathlib import Path

from moesaic.checkpoint.disk import Disk, tensor_bytes
from moesaic.checkpoint.publish import (
    OVERHEAD_BYTES,
    CheckpointMetadata,
    RetentionPolicy,
    CheckpointPaths,
    write_manifest,
    publish_checkpoint,
    encode_state,
    write_hashed,
)
from moesaic.checkpoint.snapshot import Snapshot
from moesaic.checkpoint.tensors import serialize_tensors


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
    head = CheckpointMetadata(snapshot.step, encode_state(snapshot.state), snapshot.expert_parameters, snapshot.plan)
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
