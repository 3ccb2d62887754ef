"""Reshard: a checkpoint written again as one whole, or as another number of shards.

Holds one tensor (or expert) at a time. The same content gives the same files, whatever the source
was cut like.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moesaic.checkpoint.block_index import (
    INDEX_FILE,
    BlockIndex,
    StoredBlock,
    StoredTensor,
    coverage_problems,
    first_few,
    num_experts_of,
    read_index,
)
from moesaic.checkpoint.checkpoint_directory import (
    OVERHEAD_BYTES,
    STATE_FILE,
    CheckpointMetadata,
    CheckpointPaths,
    Disk,
    FileEntry,
    Manifest,
    RetentionPolicy,
    list_checkpoints,
    publish_checkpoint,
    raise_if_damaged,
    verify_checkpoint,
    write_hashed,
    write_manifest,
)
from moesaic.checkpoint.safetensors_io import serialize_lazily
from moesaic.checkpoint.tensor_reader import TensorReader, expert_label, open_reader
from moesaic.core.errors import CheckpointError
from moesaic.core.shapes import Tensor


class CheckpointForm:
    """Family: how a checkpoint lies on disk."""

    def write(self, source: "ReshardSource", *, part: Path, disk: Disk) -> dict[str, FileEntry]:
        """Write the tensors of ``source`` into the directory ``part``."""
        raise NotImplementedError


class FullForm(CheckpointForm):
    """A file for each kind: ``model.safetensors``, ``optimizer.safetensors``."""

    def write(self, source: "ReshardSource", *, part: Path, disk: Disk) -> dict[str, FileEntry]:
        entries = {}
        for kind, tensors in source.index.files.items():
            items = [_OutputTensor(name, stored) for name, stored in tensors.items()]
            path = part / f"{kind}.safetensors"
            entries[path.name] = source.write(path, items=items, disk=disk)
        return entries


@dataclass(frozen=True, slots=True)
class ShardedForm(CheckpointForm):
    """``count`` files of about one size; tensors and experts are not cut."""

    count: int

    def write(self, source: "ReshardSource", *, part: Path, disk: Disk) -> dict[str, FileEntry]:
        items = {
            (kind, name): source.items(f"{kind}/{name}", name=name, stored=stored)
            for kind, name, stored in source.index
        }
        names = [f"shard-{n:05d}.safetensors" for n in range(self.count)]
        file_of = _assign_to_files(
            [item for several in items.values() for item in several], names=names
        )
        held = {name: [] for name in names}
        for item in (item for several in items.values() for item in several):
            held[file_of[item.key]].append(item)
        entries = {
            name: source.write(part / name, items=mine, disk=disk)
            for name, mine in held.items()
            if mine
        }
        files: dict[str, dict[str, StoredTensor]] = {}
        for (kind, name), several in sorted(items.items()):
            stored = source.index.files[kind][name]
            experts = source.experts(name, stored=stored)
            blocks = tuple(item.block(file_of[item.key]) for item in several)
            files.setdefault(kind, {})[name] = replace(
                stored, blocks=blocks, num_experts=experts, split_by_expert=experts > 0
            )
        text = BlockIndex(files).to_json().encode()
        return entries | {INDEX_FILE: write_hashed(part / INDEX_FILE, [text], disk=disk)}


def reshard(source: Path, *, root: Path, form: CheckpointForm, disk: Disk | None = None) -> Path:
    """Write the checkpoint ``source`` in another form under ``root``, and return its directory.

    The source is verified first. Raises CheckpointError: it is damaged, ``root`` is where it lies,
    or the disk refuses.
    """
    disk = disk or Disk()
    if root.resolve() == source.parent.resolve():
        raise CheckpointError(
            f"{root}: the checkpoint that is read lies in it; expected another directory to write"
        )
    manifest = verify_checkpoint(source)
    index = read_index(source, manifest=manifest)
    wrong = [
        f"{kind}/{name}: {gap}" for kind, name, stored in index for gap in coverage_problems(stored)
    ]
    raise_if_damaged(source, [first_few(wrong)] if wrong else [])
    state = (source / STATE_FILE).read_bytes()
    data = sum(stored.bytes for _, _, stored in index)
    place = CheckpointPaths(root, manifest.step, data + len(state) + OVERHEAD_BYTES)
    head = CheckpointMetadata(manifest.step, state, manifest.expert_parameters, manifest.plan)
    try:
        serial = place.create_staging(disk)
        with open_reader(source) as reader:
            entries = form.write(
                ReshardSource(reader, index, manifest), part=place.staging, disk=disk
            )
        write_manifest(place, metadata=head, serial=serial, entries=entries, disk=disk)
        publish_checkpoint(
            place, retention=RetentionPolicy(len(list_checkpoints(root)) + 1), disk=disk
        )
    except OSError as error:
        place.remove_staging(disk)
        raise place.disk_error(error, disk=disk) from error
    return place.final


@dataclass(frozen=True, slots=True)
class _OutputTensor:
    """What becomes one tensor of a file: a stored tensor, or an expert of it."""

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
        """Where it lies from now on."""
        shape = self.stored.shape
        if self.expert is None:
            return StoredBlock(file, self.key, (0,) * len(shape), shape)
        return StoredBlock(file, self.key, (self.expert, *(0 for _ in shape[1:])), (1, *shape[1:]))


@dataclass(frozen=True, slots=True)
class ReshardSource:
    """A verified checkpoint that is read as it is written."""

    reader: TensorReader
    index: BlockIndex
    manifest: Manifest

    def experts(self, name: str, *, stored: StoredTensor) -> int:
        """The number of experts that a tensor is split into; 0 if it is no bank."""
        return num_experts_of(
            name, shape=stored.shape, expert_parameters=self.manifest.expert_parameters
        )

    def items(self, path: str, *, name: str, stored: StoredTensor) -> list[_OutputTensor]:
        """Return what a tensor becomes in shards; one without a value is in the index alone."""
        experts = self.experts(name, stored=stored)
        if experts:
            return [_OutputTensor(expert_label(path, e), stored, e) for e in range(experts)]
        return [_OutputTensor(path, stored)] if stored.numel else []

    def write(self, path: Path, *, items: Sequence[_OutputTensor], disk: Disk) -> FileEntry:
        """Write a file of some items, each read when its turn comes."""
        by_key = {item.key: item for item in items}

        def read(key: str) -> Tensor:
            item = by_key[key]
            if item.expert is None:
                return self.reader.read_tensor(item.stored)
            return self.reader.read_expert(item.stored, item.expert)

        likes = {key: item.like for key, item in by_key.items()}
        return write_hashed(path, serialize_lazily(likes, read=read), disk=disk)


def _assign_to_files(items: Sequence[_OutputTensor], *, names: Sequence[str]) -> dict[str, str]:
    """Say which file each item goes to: the largest first, always to the lightest file."""
    load = dict.fromkeys(names, 0)
    file_of = {}
    for item in sorted(items, key=lambda item: (-item.bytes, item.key)):
        lightest = min(names, key=lambda name: (load[name], name))
        file_of[item.key] = lightest
        load[lightest] += item.bytes
    return file_of
