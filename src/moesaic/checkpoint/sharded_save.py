"""Sharded save: each rank offers its blocks, rank 0 assigns them, each rank writes its part.

Work is balanced by bytes, experts are stored one by one, and rank 0 publishes the directory.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moesaic.checkpoint.block_index import (
    INDEX_FILE,
    BlockIndex,
    Shape,
    StoredBlock,
    StoredTensor,
    block_key,
    num_experts_of,
    sharded_tensor,
)
from moesaic.checkpoint.checkpoint_directory import (
    CheckpointMetadata,
    CheckpointPaths,
    Disk,
    RetentionPolicy,
    publish_checkpoint,
    write_hashed,
    write_manifest,
)
from moesaic.checkpoint.checkpoint_ranks import CheckpointRanks
from moesaic.checkpoint.safetensors_io import serialize_tensors
from moesaic.checkpoint.snapshot import Shard, ShardBlock, ShardFiles, as_shard
from moesaic.core.errors import CheckpointError
from moesaic.core.file_reader import FileEntry
from moesaic.core.shapes import Tensor


@dataclass(frozen=True, slots=True)
class OfferedTensor:
    """What a rank has of a tensor: of the full one shape and dtype; offset and shape of blocks."""

    shape: Shape
    dtype: torch.dtype
    blocks: tuple[tuple[Shape, Shape], ...]

    @staticmethod
    def of(shard: Shard) -> "OfferedTensor":
        """Return what a rank offers of a shard."""
        blocks = tuple((block.offset, tuple(block.data.shape)) for block in shard.blocks)
        return OfferedTensor(shard.shape, shard.dtype, blocks)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, slots=True)
class RankWork:
    """The blocks that a rank writes, each with the path of its tensor, and bytes for all ranks."""

    required_bytes: int
    blocks: tuple[tuple[str, StoredBlock], ...] = ()


Offer = Mapping[str, OfferedTensor]  # by path, ``model/encoder.0...``


class ShardedSave:
    """One save of all ranks into ``paths``: a safetensors file per rank that writes blocks."""

    def __init__(
        self,
        paths: CheckpointPaths,
        *,
        metadata: CheckpointMetadata,
        retention: RetentionPolicy,
        ranks: CheckpointRanks,
        disk: Disk,
    ) -> None:
        self.paths, self.metadata, self.retention = paths, metadata, retention
        self.ranks, self.disk = ranks, disk
        self._serial, self._index = 0, BlockIndex({})  # of rank 0

    def write(self, files: ShardFiles) -> Path:
        """Write the checkpoint, and return its directory. Collective. Raises CheckpointError."""
        shards = split_by_expert(files, expert_parameters=self.metadata.expert_parameters)
        try:
            work: RankWork = self.ranks.exchange(
                lambda: {path: OfferedTensor.of(shard) for path, shard in shards.items()},
                at_rank0=self._assign,
            )
            self.paths = replace(self.paths, required_bytes=work.required_bytes)
            self.ranks.exchange(lambda: self._write_blocks(shards, work), at_rank0=self._publish)
        except Exception:
            if self.ranks.world.rank == 0:
                self.paths.remove_staging(self.disk)
            raise
        return self.paths.final

    def _assign(self, offers: list[Offer]) -> list[RankWork]:
        index = plan_save(offers, expert_parameters=self.metadata.expert_parameters)
        size = self.paths.required_bytes + sum(stored.bytes for _, _, stored in index)
        blocks: dict[str, list[tuple[str, StoredBlock]]] = defaultdict(list)
        for file, name, stored in index:
            for block in stored.blocks:
                blocks[block.file].append((f"{file}/{name}", block))
        self.paths, self._index = replace(self.paths, required_bytes=size), index
        with self._disk_errors():
            self._serial = self.paths.create_staging(self.disk)
        return [RankWork(size, tuple(blocks[_file_of(rank)])) for rank in range(len(offers))]

    def _write_blocks(self, shards: Mapping[str, Shard], work: RankWork) -> dict[str, FileEntry]:
        data = {
            (path, block.offset): block.data
            for path, shard in shards.items()
            for block in shard.blocks
        }
        tensors: dict[str, Tensor] = {}
        for path, block in work.blocks:
            whole = shards[path].shape
            split = self._num_experts(path, whole) > 0
            tensor = data[path, block.offset]
            tensors[block.key] = tensor[0] if split else tensor
        if not tensors:
            return {}
        name = _file_of(self.ranks.world.rank)
        with self._disk_errors():
            chunks = serialize_tensors(tensors)
            return {name: write_hashed(self.paths.staging / name, chunks, disk=self.disk)}

    def _num_experts(self, path: str, shape: Shape) -> int:
        name, sizes = path.partition("/")[2], self.metadata.expert_parameters
        return num_experts_of(name, shape=shape, expert_parameters=sizes)

    def _publish(self, written: list[dict[str, FileEntry]]) -> list[None]:
        entries = {name: entry for files in written for name, entry in files.items()}
        self._require_visible(entries)
        text = self._index.to_json().encode()
        with self._disk_errors():
            path = self.paths.staging / INDEX_FILE
            entries[INDEX_FILE] = write_hashed(path, [text], disk=self.disk)
            write_manifest(
                self.paths,
                metadata=self.metadata,
                serial=self._serial,
                entries=entries,
                disk=self.disk,
            )
            publish_checkpoint(self.paths, retention=self.retention, disk=self.disk)
        return [None] * len(written)

    def _require_visible(self, entries: Mapping[str, FileEntry]) -> None:
        for name, entry in entries.items():
            path = self.paths.staging / name
            if not path.is_file() or path.stat().st_size != entry.bytes:
                raise CheckpointError(
                    f"{path}: written by its rank but not visible to rank 0. Expected a directory "
                    "shared by all ranks: use a file system that all machines share."
                )

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Convert an OSError here, where rank and paths are known; it is raised on every rank."""
        world = self.ranks.world
        try:
            yield
        except OSError as error:
            rank = f"on rank {world.rank}" if world.size > 1 else ""
            raise self.paths.disk_error(error, disk=self.disk, rank=rank) from None


def split_by_expert(files: ShardFiles, *, expert_parameters: Mapping[str, int]) -> dict[str, Shard]:
    """Return a rank's shards by path: blocks of one expert each, without empty blocks."""
    shards = {}
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            shard = as_shard(tensor)
            blocks = [block for block in shard.blocks if block.data.numel()]
            if num_experts_of(name, shape=shard.shape, expert_parameters=expert_parameters):
                blocks = [
                    ShardBlock((block.offset[0] + i, *block.offset[1:]), block.data[i : i + 1])
                    for block in blocks
                    for i in range(len(block.data))
                ]
            shards[f"{file}/{name}"] = replace(shard, blocks=tuple(blocks))
    return shards


def plan_save(offers: Sequence[Offer], *, expert_parameters: Mapping[str, int]) -> BlockIndex:
    """Return the index of a checkpoint: each block in the file of one rank that offers it.

    Raises CheckpointError unless ranks agree and the blocks cover every tensor exactly once.
    """
    tensors = _agreed_tensors(offers)
    writers = _assign_blocks(offers)
    files: dict[str, dict[str, StoredTensor]] = {}
    for path, tensor in sorted(tensors.items()):
        file, _, name = path.partition("/")
        experts = num_experts_of(name, shape=tensor.shape, expert_parameters=expert_parameters)
        keys = {
            block: block_key(path, block=block, shape=tensor.shape, split=experts > 0)
            for block in sorted(writers[path])
        }
        files.setdefault(file, {})[name] = sharded_tensor(
            name,
            shape=tensor.shape,
            dtype=tensor.dtype,
            blocks=[StoredBlock(_file_of(writers[path][b]), key, *b) for b, key in keys.items()],
            expert_parameters=expert_parameters,
        )
    index = BlockIndex(files)
    if problems := index.problems():
        raise CheckpointError(
            f"the shards do not cover every tensor exactly once: {'; '.join(problems)}. "
            "The sharding of the model is wrong; nothing was written."
        )
    return index


def _agreed_tensors(offers: Sequence[Offer]) -> dict[str, OfferedTensor]:
    first: dict[str, tuple[int, OfferedTensor]] = {}
    for rank, tensors in enumerate(offers):
        for path, tensor in tensors.items():
            one, other = first.setdefault(path, (rank, tensor))
            if (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
                raise CheckpointError(
                    f"{path} is {other} on rank {one} but {tensor} on rank {rank}: ranks must "
                    "agree on shape and dtype of the full tensor"
                )
    return {path: tensor for path, (_, tensor) in first.items()}


def _assign_blocks(offers: Sequence[Offer]) -> dict[str, dict[tuple[Shape, Shape], int]]:
    """Return the rank that writes each block, by path: the one with the fewest bytes so far."""
    holders: dict[tuple[str, Shape], dict[int, Shape]] = defaultdict(dict)
    for rank, tensors in enumerate(offers):
        for path, tensor in tensors.items():
            for offset, size in tensor.blocks:
                holders[path, offset][rank] = size
    writers: dict[str, dict[tuple[Shape, Shape], int]] = defaultdict(dict)
    load = [0] * len(offers)
    for (path, offset), sizes in holders.items():
        if len(set(sizes.values())) > 1:
            one_each = {size: rank for rank, size in sizes.items()}
            sides = " and ".join(f"{list(size)} on rank {rank}" for size, rank in one_each.items())
            raise CheckpointError(f"{path}: blocks at {list(offset)} differ, {sides}")
        writer = min(sizes, key=lambda rank: (load[rank], rank))
        writers[path][offset, sizes[writer]] = writer
        load[writer] += math.prod(sizes[writer]) * offers[writer][path].dtype.itemsize
    return writers


def _file_of(rank: int) -> str:
    return f"shard-{rank:05d}.safetensors"
