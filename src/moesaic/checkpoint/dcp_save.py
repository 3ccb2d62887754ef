"""Save planner and storage writer for ``torch.distributed.checkpoint`` (DCP).

They follow its protocol: every rank lists its blocks, the coordinator assigns the blocks to ranks,
every rank writes its part, the coordinator finishes, and an error on one rank is raised on all. The
format is safetensors and JSON instead of pickles; work is balanced by bytes, experts are stored one
by one, and the directory is published atomically.
"""

import io
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from moesaic.checkpoint.block_index import (
    INDEX_FILE,
    BlockIndex,
    Shape,
    StoredBlock,
    StoredTensor,
    block_key,
    coverage_problems,
    first_few,
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
from moesaic.checkpoint.safetensors_io import serialize_tensors
from moesaic.checkpoint.snapshot import Shard, ShardBlock, ShardFiles, as_shard
from moesaic.core.errors import CheckpointError
from moesaic.core.file_reader import FileEntry
from moesaic.core.shapes import Tensor
from moesaic.distributed.world import World

ShardedStateDict = Mapping[str, Shard]  # DCP's state dict: by path, ``model/encoder.0...``


def to_state_dict(files: ShardFiles, *, expert_parameters: Mapping[str, int]) -> dict[str, Shard]:
    """Return a rank's shards by path: blocks of one expert each, without empty blocks."""
    return {
        f"{file}/{name}": _split_by_expert(
            as_shard(tensor),
            num_experts_of(name, shape=tuple(tensor.shape), expert_parameters=expert_parameters),
        )
        for file, tensors in files.items()
        for name, tensor in tensors.items()
    }


def _split_by_expert(shard: Shard, num_experts: int) -> Shard:
    blocks = (block for block in shard.blocks if block.data.numel())
    if num_experts:
        blocks = (
            ShardBlock((block.offset[0] + i, *block.offset[1:]), block.data[i : i + 1])
            for block in blocks
            for i in range(len(block.data))
        )
    return replace(shard, blocks=tuple(blocks))


class BalancedSavePlanner(SavePlanner):
    """Assigns each block to one rank that has it: the rank with the fewest bytes to write."""

    def __init__(self, expert_parameters: Mapping[str, int]) -> None:
        self._expert_parameters = expert_parameters

    def set_up_planner(
        self,
        state_dict: ShardedStateDict,
        storage_meta: Any = None,  # noqa: ARG002
        is_coordinator: bool = False,  # noqa: ARG002, FBT001, FBT002
    ) -> None:
        self._state = state_dict
        self._data = {
            (path, block.offset): block.data
            for path, shard in state_dict.items()
            for block in shard.blocks
        }

    def create_local_plan(self) -> SavePlan:
        items = [
            _write_item(path, shard=shard, block=block)
            for path, shard in self._state.items()
            for block in shard.blocks
        ]
        tensors = {path: (shard.shape, shard.dtype) for path, shard in self._state.items()}
        return SavePlan(items, planner_data=tensors)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        tensors = _merge_tensor_metadata([plan.planner_data for plan in all_plans])
        plans = [replace(plan, planner_data=None) for plan in _deduplicate(all_plans)]
        plans, metadata = create_default_global_save_plan(plans)
        for path, (shape, dtype) in tensors.items():
            if not math.prod(shape):  # no block is written
                empty = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])
                metadata.state_dict_metadata[path] = empty
        _require_full_coverage(
            tensors, metadata=metadata, expert_parameters=self._expert_parameters
        )
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._data[_block_id(write_item.index)]


def _write_item(path: str, *, shard: Shard, block: ShardBlock) -> WriteItem:
    offset, size = torch.Size(block.offset), block.data.shape
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(offset, size),
        properties=TensorProperties(dtype=shard.dtype),
        size=torch.Size(shard.shape),
    )
    return WriteItem(MetadataIndex(path, offset), WriteItemType.SHARD, tensor_data=data)


def _block_id(index: MetadataIndex) -> tuple[str, Shape]:
    return index.fqn, tuple(index.offset or ())


def _tensor_data(item: WriteItem) -> TensorWriteData:
    if item.tensor_data is None:
        raise TypeError(f"{item.index.fqn} is not a tensor")
    return item.tensor_data


def _item_bytes(item: WriteItem) -> int:
    """Return the number of bytes of the block that an item writes."""
    data = _tensor_data(item)
    return math.prod(data.chunk.sizes) * data.properties.dtype.itemsize


def _merge_tensor_metadata(
    plans: Sequence[Mapping[str, tuple[Shape, torch.dtype]]],
) -> dict[str, Any]:
    """Return shape and dtype of every tensor; all ranks must agree."""
    first: dict[str, tuple[int, Any]] = {}
    for rank, tensors in enumerate(plans):
        for path, tensor in tensors.items():
            one, other = first.setdefault(path, (rank, tensor))
            if other != tensor:
                raise CheckpointError(
                    f"{path} is {describe_tensor(other)} on rank {one} but "
                    f"{describe_tensor(tensor)} on rank {rank}: ranks must agree on "
                    "shape and dtype of the full tensor"
                )
    return {path: tensor for path, (_, tensor) in first.items()}


def describe_tensor(tensor: tuple[Shape, torch.dtype]) -> str:
    """Return shape and dtype for a message."""
    return f"{tensor[1]} {list(tensor[0])}"


def _deduplicate(plans: Sequence[SavePlan]) -> list[SavePlan]:
    """Keep each block in the plan of one of the ranks that have it."""
    holders: dict[tuple[str, Shape], list[tuple[int, WriteItem]]] = defaultdict(list)
    for rank, plan in enumerate(plans):
        for item in plan.items:
            holders[_block_id(item.index)].append((rank, item))
    assigned: list[list[WriteItem]] = [[] for _ in plans]
    load = [0] * len(plans)
    for (path, offset), items in holders.items():
        sizes = {tuple(_tensor_data(item).chunk.sizes): rank for rank, item in items}
        if len(sizes) > 1:
            sides = " and ".join(f"{list(size)} on rank {rank}" for size, rank in sizes.items())
            raise CheckpointError(f"{path}: blocks at {list(offset)} differ, {sides}")
        rank, item = min(items, key=lambda one: (load[one[0]], one[0]))
        assigned[rank].append(item)
        load[rank] += _item_bytes(item)
    return [replace(plan, items=items) for plan, items in zip(plans, assigned, strict=True)]


def _require_full_coverage(
    tensors: Mapping[str, tuple[Shape, torch.dtype]],
    *,
    metadata: Metadata,
    expert_parameters: Mapping[str, int],
) -> None:
    problems = []
    for path, (shape, dtype) in tensors.items():
        found = metadata.state_dict_metadata.get(path)
        chunks = found.chunks if isinstance(found, TensorStorageMetadata) else []
        blocks = (StoredBlock("a rank", path, tuple(c.offsets), tuple(c.sizes)) for c in chunks)
        stored = sharded_tensor(
            path.partition("/")[2],
            shape=shape,
            dtype=dtype,
            blocks=blocks,
            expert_parameters=expert_parameters,
        )
        problems += [f"{path}: {problem}" for problem in coverage_problems(stored)]
    if problems:
        raise CheckpointError(
            f"the shards do not cover every tensor exactly once: {first_few(problems)}. "
            "The sharding of the model is wrong; nothing was written."
        )


@dataclass(frozen=True, slots=True)
class _WrittenBlock:
    """Result of one write item."""

    block: StoredBlock
    entry: FileEntry


class SafetensorsStorageWriter(StorageWriter):
    """Writes one safetensors file per rank that has blocks; the coordinator publishes."""

    def __init__(
        self,
        paths: CheckpointPaths,
        *,
        metadata: CheckpointMetadata,
        retention: RetentionPolicy,
        world: World,
        disk: Disk,
    ) -> None:
        self.paths, self.metadata, self.retention = paths, metadata, retention
        self.world, self.disk = world, disk
        self._serial = 0

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: FBT001
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        size = sum(_item_bytes(item) for plan in plans for item in plan.items)
        self.paths = replace(self.paths, required_bytes=self.paths.required_bytes + size)
        with self._raise_disk_errors():
            self._serial = self.paths.create_staging(self.disk)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        done: Future[list[WriteResult]] = Future()
        name = f"shard-{self.world.rank:05d}.safetensors"
        blocks = [self._block(item, file=name) for item in plan.items]
        tensors = {
            block.key: _tensor_to_write(
                planner.resolve_data(item), split=self._is_split_by_expert(item)
            )
            for block, item in zip(blocks, plan.items, strict=True)
        }
        results = []
        if blocks:
            with self._raise_disk_errors():
                entry = write_hashed(
                    self.paths.staging / name, serialize_tensors(tensors), disk=self.disk
                )
            results = [
                WriteResult(item.index, _item_bytes(item), _WrittenBlock(block, entry))
                for block, item in zip(blocks, plan.items, strict=True)
            ]
        done.set_result(results)
        return done

    def _is_split_by_expert(self, item: WriteItem) -> bool:
        shape = tuple(_tensor_data(item).size)
        name = item.index.fqn.partition("/")[2]
        sizes = self.metadata.expert_parameters
        return num_experts_of(name, shape=shape, expert_parameters=sizes) > 0

    def _block(self, item: WriteItem, *, file: str) -> StoredBlock:
        data = _tensor_data(item)
        split = self._is_split_by_expert(item)
        where = (tuple(data.chunk.offsets), tuple(data.chunk.sizes))
        key = block_key(item.index.fqn, block=where, shape=tuple(data.size), split=split)
        return StoredBlock(file, key, *where)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        blocks: dict[str, list[StoredBlock]] = defaultdict(list)
        entries: dict[str, FileEntry] = {}
        for result in itertools.chain.from_iterable(results):
            written = result.storage_data
            blocks[result.index.fqn].append(written.block)
            entries[written.block.file] = written.entry
        self._require_visible(entries)
        with self._raise_disk_errors():
            self._publish(
                _build_index(
                    metadata, blocks=blocks, expert_parameters=self.metadata.expert_parameters
                ),
                entries=entries,
            )

    def _publish(self, index: BlockIndex, *, entries: dict[str, FileEntry]) -> None:
        text = index.to_json().encode()
        entries[INDEX_FILE] = write_hashed(self.paths.staging / INDEX_FILE, [text], disk=self.disk)
        write_manifest(
            self.paths, metadata=self.metadata, serial=self._serial, entries=entries, disk=self.disk
        )
        publish_checkpoint(self.paths, retention=self.retention, disk=self.disk)

    def _require_visible(self, entries: Mapping[str, FileEntry]) -> None:
        for name, entry in entries.items():
            path = self.paths.staging / name
            if not path.is_file() or path.stat().st_size != entry.bytes:
                raise CheckpointError(
                    f"{path}: written by its rank but not visible to rank 0. Expected a directory "
                    "shared by all ranks: use a file system that all machines share."
                )

    @contextmanager
    def _raise_disk_errors(self) -> Iterator[None]:
        """Convert an OSError here, where rank and paths are known; it is raised on every rank."""
        try:
            yield
        except OSError as error:
            rank = f"on rank {self.world.rank}" if self.world.size > 1 else ""
            raise self.paths.disk_error(error, disk=self.disk, rank=rank) from None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:  # noqa: ARG003
        return True


def _tensor_to_write(data: Tensor | io.BytesIO, *, split: bool) -> Tensor:
    if not isinstance(data, Tensor):
        raise TypeError("only tensors are saved in shards")
    return data[0] if split else data


def _build_index(
    metadata: Metadata,
    *,
    blocks: Mapping[str, Sequence[StoredBlock]],
    expert_parameters: Mapping[str, int],
) -> BlockIndex:
    files: dict[str, dict[str, StoredTensor]] = {}
    for path, tensor in sorted(metadata.state_dict_metadata.items()):
        if not isinstance(tensor, TensorStorageMetadata):
            continue
        file, _, name = path.partition("/")
        files.setdefault(file, {})[name] = sharded_tensor(
            name,
            shape=tuple(tensor.size),
            dtype=tensor.properties.dtype,
            blocks=sorted(blocks.get(path, ()), key=lambda b: b.offset),
            expert_parameters=expert_parameters,
        )
    return BlockIndex(files)
