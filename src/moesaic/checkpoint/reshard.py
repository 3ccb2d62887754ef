"""Reshard: write a checkpoint again in the full form, or with another number of shards.

One tensor (or expert) is in memory at a time. Equal content gives equal files, whatever the form of
the source.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moesaic.checkpoint.block_index import (
    INDEX_FILE,
    BlockIndex,
    StoredBlock,
    StoredTensor,
    expert_label,
    num_experts_of,
    read_index,
    sharded_tensor,
)
from moesaic.checkpoint.checkpoint_directory import (
    OVERHEAD_BYTES,
    CheckpointMetadata,
    CheckpointPaths,
    Disk,
    RetentionPolicy,
    encode_state,
    list_checkpoints,
    write_checkpoint,
    write_hashed,
)
from moesaic.checkpoint.full_checkpoint import read_state
from moesaic.checkpoint.manifest import Manifest, raise_if_damaged, verify_checkpoint
from moesaic.checkpoint.safetensors_io import serialize_tensors
from moesaic.checkpoint.tensor_reader import TensorReader, open_reader
from moesaic.core.errors import CheckpointError
from moesaic.core.file_reader import FileEntry
from moesaic.core.shapes import Tensor


class CheckpointForm:
    """Family: the form of a checkpoint on disk."""

    def write(
        self, source: "ReshardSource", *, directory: Path, disk: Disk
    ) -> dict[str, FileEntry]:
        """Write the tensors of ``source`` into ``directory``."""
        raise NotImplementedError


class FullForm(CheckpointForm):
    """A file for each kind: ``model.safetensors``, ``optimizer.safetensors``."""

    def write(
        self, source: "ReshardSource", *, directory: Path, disk: Disk
    ) -> dict[str, FileEntry]:
        entries = {}
        for kind, tensors in source.index.files.items():
            outputs = [_OutputTensor(name, stored) for name, stored in tensors.items()]
            path = directory / f"{kind}.safetensors"
            entries[path.name] = source.write(path, outputs=outputs, disk=disk)
        return entries


@dataclass(frozen=True, slots=True)
class ShardedForm(CheckpointForm):
    """``count`` files of about equal size; tensors and experts are not split."""

    count: int

    def write(
        self, source: "ReshardSource", *, directory: Path, disk: Disk
    ) -> dict[str, FileEntry]:
        outputs = {
            (kind, name): source.outputs(f"{kind}/{name}", name=name, stored=stored)
            for kind, name, stored in source.index
        }
        every = [output for several in outputs.values() for output in several]
        names = [f"shard-{n:05d}.safetensors" for n in range(self.count)]
        file_of = _assign_to_files(every, names=names)
        contents = {name: [o for o in every if file_of[o.key] == name] for name in names}
        entries = {
            name: source.write(directory / name, outputs=inside, disk=disk)
            for name, inside in contents.items()
            if inside
        }
        files: dict[str, dict[str, StoredTensor]] = {}
        for (kind, name), several in sorted(outputs.items()):
            stored = source.index.files[kind][name]
            files.setdefault(kind, {})[name] = sharded_tensor(
                name,
                shape=stored.shape,
                dtype=stored.dtype,
                blocks=[output.block(file_of[output.key]) for output in several],
                expert_parameters=source.manifest.expert_parameters,
            )
        text = BlockIndex(files).to_json().encode()
        return entries | {INDEX_FILE: write_hashed(directory / INDEX_FILE, [text], disk=disk)}


def reshard(source: Path, *, root: Path, form: CheckpointForm, disk: Disk | None = None) -> Path:
    """Write the checkpoint ``source`` in another form under ``root``, and return its directory.

    The source is verified first. Raises CheckpointError if it is damaged, if ``root`` is its root,
    or on a disk error.
    """
    disk = disk or Disk()
    if root.resolve() == source.parent.resolve():
        raise CheckpointError(
            f"{root}: the source checkpoint is in it; expected another directory to write to"
        )
    manifest = verify_checkpoint(source)
    index = read_index(source, manifest=manifest)
    raise_if_damaged(source, index.problems())
    state = encode_state(read_state(source))
    data = sum(stored.bytes for _, _, stored in index)
    with open_reader(source) as reader:
        tensors = ReshardSource(reader, index, manifest)
        return write_checkpoint(
            CheckpointPaths(root, manifest.step, data + len(state) + OVERHEAD_BYTES),
            metadata=CheckpointMetadata(
                manifest.step, state, manifest.expert_parameters, manifest.plan
            ),
            retention=RetentionPolicy(len(list_checkpoints(root)) + 1),
            disk=disk,
            write_files=lambda directory: form.write(tensors, directory=directory, disk=disk),
        )


@dataclass(frozen=True, slots=True)
class _OutputTensor:
    """One tensor of an output file: a stored tensor, or an expert of it."""

    key: str
    stored: StoredTensor
    expert: int | None = None

    @property
    def like(self) -> Tensor:
        shape = self.stored.shape if self.expert is None else self.stored.shape[1:]
        return torch.empty(shape, dtype=self.stored.dtype, device="meta")

    @property
    def bytes(self) -> int:
        return self.like.numel() * self.stored.dtype.itemsize

    def block(self, file: str) -> StoredBlock:
        """Return its block in ``file``."""
        shape = self.stored.shape
        if self.expert is None:
            return StoredBlock(file, self.key, (0,) * len(shape), shape)
        return StoredBlock(file, self.key, (self.expert, *(0 for _ in shape[1:])), (1, *shape[1:]))


@dataclass(frozen=True, slots=True)
class ReshardSource:
    """A verified checkpoint, read while the other is written."""

    reader: TensorReader
    index: BlockIndex
    manifest: Manifest

    def outputs(self, path: str, *, name: str, stored: StoredTensor) -> list[_OutputTensor]:
        """Return the outputs of a tensor in the sharded form; none for a tensor without values."""
        experts = num_experts_of(
            name, shape=stored.shape, expert_parameters=self.manifest.expert_parameters
        )
        if experts:
            return [_OutputTensor(expert_label(path, e), stored, e) for e in range(experts)]
        return [_OutputTensor(path, stored)] if stored.numel else []

    def write(self, path: Path, *, outputs: Sequence[_OutputTensor], disk: Disk) -> FileEntry:
        """Write one file, reading each tensor when it is written."""
        by_key = {output.key: output for output in outputs}

        def read(key: str) -> Tensor:
            output = by_key[key]
            if output.expert is None:
                return self.reader.read_tensor(output.stored)
            return self.reader.read_expert(output.stored, output.expert)

        likes = {key: output.like for key, output in by_key.items()}
        return write_hashed(path, serialize_tensors(likes, read=read), disk=disk)


def _assign_to_files(outputs: Sequence[_OutputTensor], *, names: Sequence[str]) -> dict[str, str]:
    """Assign each output to a file: the largest first, always to the smallest file so far."""
    load = dict.fromkeys(names, 0)
    file_of = {}
    for output in sorted(outputs, key=lambda output: (-output.bytes, output.key)):
        smallest = min(names, key=lambda name: (load[name], name))
        file_of[output.key] = smallest
        load[smallest] += output.bytes
    return file_of
