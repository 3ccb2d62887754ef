"""A small checkpoint in each form, and a way to change its files under a valid manifest."""

import json

import torch
from safetensors.torch import load_file, save_file

from moesaic.checkpoint.checkpoint_directory import RetentionPolicy
from moesaic.checkpoint.full_checkpoint import save_checkpoint
from moesaic.checkpoint.manifest import MANIFEST_FILE, read_manifest
from moesaic.checkpoint.reshard import ShardedForm, reshard
from moesaic.checkpoint.sharded_checkpoint import CheckpointSaver
from moesaic.checkpoint.snapshot import Snapshot
from moesaic.core.file_reader import FileEntry
from moesaic.core.files import sha256

EXPERT_PARAMETERS = {"up": 4, "up_bias": 4}
FORMS = {"whole": None, "one shard": 1, "three shards": 3}


def snapshot(step=5, **changes):
    generator = torch.Generator().manual_seed(0)
    model = {
        "up": torch.randn(4, 3, 2, generator=generator),
        "up_bias": torch.zeros(4, 2),
        "dense": torch.randn(5, 4, generator=generator),
        "half": torch.randn(3, generator=generator).bfloat16(),
        "none": torch.empty(0, 2),
    } | changes
    optimizer = {f"m/{name}": torch.zeros_like(tensor) for name, tensor in model.items()}
    steps = {f"step/{name}": torch.tensor(3.0) for name in model}
    files = {"model": model, "optimizer": optimizer | steps}
    return Snapshot(step, files, {"a": [1, "ž"]}, EXPERT_PARAMETERS, {"data": 2})


def written(tmp_path, form, made=None):
    """Return a checkpoint directory in a form of ``FORMS``."""
    path = save_checkpoint(tmp_path / "source", made or snapshot())
    if FORMS[form] is None:
        return path
    return reshard(path, root=tmp_path / f"sharded-{FORMS[form]}", form=ShardedForm(FORMS[form]))


def rewritten(path, name, change):
    """Change a file of a checkpoint and update its hash in the manifest."""
    file = path / name
    if file.suffix == ".safetensors":
        save_file(change(load_file(file)), file)
    else:
        file.write_text(json.dumps(change(json.loads(file.read_text()))))
    manifest = read_manifest(path)
    entry = FileEntry(bytes=file.stat().st_size, sha256=sha256(file))
    changed = manifest.model_copy(update={"files": manifest.files | {name: entry}})
    (path / MANIFEST_FILE).write_text(changed.to_json())


def file_with(path, key):
    """Return the name of the file that holds a tensor."""
    for file in sorted(path.glob("*.safetensors")):
        if key in load_file(file):
            return file.name
    raise KeyError(key)


def save_sharded(root, snapshot, *, world, retention=RetentionPolicy(), disk=None):  # noqa: B008
    """Save one sharded checkpoint. Collective."""
    saver = CheckpointSaver(root, world=world, disk=disk)
    try:
        return saver.save(snapshot, retention=retention)
    finally:
        saver.close()
