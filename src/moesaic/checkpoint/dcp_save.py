"""Saving by many ranks: planner and writer for ``torch.distributed.checkpoint``.

Its protocol is kept: every rank says what it holds, the coordinator decides who writes what, every
rank writes its part, the coordinator finishes, and an error on one rank is raised on all. What is
written is ours: safetensors and JSON instead of pickles, blocks weighed by their own size, experts
one by one, and a directory that becomes visible at the end.
"""

import io
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
)
from moesaic.checkpoint.checkpoint_directory import (
    CheckpointMetadata,
    CheckpointPaths,
    Disk,
    FileEntry,
    RetentionPolicy,
    publish_checkpoint,
    write_hashed,
    write_manifest,
)
from moesaic.checkpoint.safetensors_io import serialize_tensors
from moesaic.checkpoint.snapshot import Shard, ShardBlock, ShardFiles, as_shard
from moesaic.core.errors import CheckpointError
from moesaic.core.shapes import Tensor
from moesaic.distributed.world import World

ShardedStateDict = Mapping[
    str, Shard
]  # by path, ``model/encoder.0...``: what DCP calls a state dict


def to_state_dict(files: ShardFiles, *, expert_parameters: Mapping[str, int]) -> dict[str, Shard]:
    """Return what a rank holds by path: pieces of banks one expert long, nothing empty."""
    return {
        f"{file}/{name}": _split_by_expert(
            as_shard(held),
            holds_experts=_holds_experts(name, held, expert_parameters=expert_parameters),
        )
        for file, tensors in files.items()
        for name, held in tensors.items()
    }


def _holds_experts(name: str, held: Any, *, expert_parameters: Mapping[str, int]) -> bool:
    return num_experts_of(name, shape=tuple(held.shape), expert_parameters=expert_parameters) > 0


def _split_by_expert(shard: Shard, *, holds_experts: bool) -> Shard:
    pieces = (piece for piece in shard.blocks if piece.data.numel())
    if not holds_experts:
        return replace(shard, blocks=tuple(pieces))
    alone = (
        ShardBlock((piece.offset[0] + i, *piece.offset[1:]), piece.data[i : i + 1])
        for piece in pieces
        for i in range(len(piece.data))
    )
    return replace(shard, blocks=tuple(alone))


class BalancedSavePlanner(SavePlanner):
    """Every block is written once, by the holder of it that has the fewest bytes to write."""

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
            (path, piece.offset): piece.data
            for path, shard in state_dict.items()
            for piece in shard.blocks
        }

    def create_local_plan(self) -> SavePlan:
        items = [
            _write_item(path, shard=shard, piece=piece)
            for path, shard in self._state.items()
            for piece in shard.blocks
        ]
        heads = {path: (shard.shape, shard.dtype) for path, shard in self._state.items()}
        return SavePlan(items, planner_data=heads)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        heads = _merge_tensor_metadata([plan.planner_data for plan in all_plans])
        plans = [replace(plan, planner_data=None) for plan in _deduplicate(all_plans)]
        plans, metadata = create_default_global_save_plan(plans)
        for path, (shape, dtype) in heads.items():
            if not math.prod(shape):  # nobody writes it, but it is there
                head = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])
                metadata.state_dict_metadata[path] = head
        _require_full_coverage(heads, metadata=metadata, expert_parameters=self._expert_parameters)
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._data[_block_id(write_item.index)]


def _write_item(path: str, *, shard: Shard, piece: ShardBlock) -> WriteItem:
    offset, size = torch.Size(piece.offset), piece.data.shape
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
    """Bytes of the block that an item writes."""
    data = _tensor_data(item)
    return math.prod(data.chunk.sizes) * data.properties.dtype.itemsize


def _merge_tensor_metadata(
    heads: Sequence[Mapping[str, tuple[Shape, torch.dtype]]],
) -> dict[str, Any]:
    """Shape and dtype of every tensor that some rank knows; all ranks must say the same."""
    first: dict[str, tuple[int, Any]] = {}
    for rank, known in enumerate(heads):
        for path, head in known.items():
            one, other = first.setdefault(path, (rank, head))
            if other != head:
                raise CheckpointError(
                    f"{path} is {describe_tensor(other)} on rank {one} but {describe_tensor(head)} on rank {rank}: "
                    "ranks must agree on the whole tensor that they hold parts of"
                )
    return {path: head for path, (_, head) in first.items()}


def describe_tensor(head: tuple[Shape, torch.dtype]) -> str:
    """Return shape and dtype for a message."""
    return f"{head[1]} {list(head[0])}"


def _deduplicate(plans: Sequence[SavePlan]) -> list[SavePlan]:
    """Leave each block in the plan of one of its holders."""
    holders: dict[tuple[str, Shape], list[tuple[int, WriteItem]]] = defaultdict(list)
    for rank, plan in enumerate(plans):
        for item in plan.items:
            holders[_block_id(item.index)].append((rank, item))
    kept: list[list[WriteItem]] = [[] for _ in plans]
    load = [0] * len(plans)
    for (path, offset), held in holders.items():
        sizes = {tuple(_tensor_data(item).chunk.sizes): rank for rank, item in held}
        if len(sizes) > 1:
            held_as = " and ".join(f"{list(size)} on rank {rank}" for size, rank in sizes.items())
            raise CheckpointError(f"{path}: blocks at {list(offset)} differ, {held_as}")
        rank, item = min(held, key=lambda one: (load[one[0]], one[0]))
        kept[rank].append(item)
        load[rank] += _item_bytes(item)
    return [replace(plan, items=items) for plan, items in zip(plans, kept, strict=True)]


def _require_full_coverage(
    heads: Mapping[str, tuple[Shape, torch.dtype]],
    *,
    metadata: Metadata,
    expert_parameters: Mapping[str, int],
) -> None:
    wrong = []
    for path, (shape, dtype) in heads.items():
        held = metadata.state_dict_metadata.get(path)
        chunks = held.chunks if isinstance(held, TensorStorageMetadata) else []
        blocks = (StoredBlock("a rank", path, tuple(c.offsets), tuple(c.sizes)) for c in chunks)
        experts = num_experts_of(
            path.partition("/")[2], shape=shape, expert_parameters=expert_parameters
        )
        stored = StoredTensor(shape, dtype, tuple(blocks), experts, split_by_expert=experts > 0)
        wrong += [f"{path}: {gap}" for gap in coverage_problems(stored)]
    if wrong:
        raise CheckpointError(
            f"the ranks do not hold every tensor once and whole: {first_few(wrong)}. "
            "The layout of the model over the ranks is wrong; nothing was written."
        )


@dataclass(frozen=True, slots=True)
class _WrittenBlock:
    """What became of one write item."""

    block: StoredBlock
    entry: FileEntry


class SafetensorsStorageWriter(StorageWriter):
    """One safetensors file per rank with something to write; the coordinator publishes."""

    def __init__(
        self,
        paths: CheckpointPaths,
        *,
        metadata: CheckpointMetadata,
        retention: RetentionPolicy,
        world: World,
        disk: Disk,
    ) -> None:
        self.paths, self.metadata, self.retention, self.world, self.disk = (
            paths,
            metadata,
            retention,
            world,
            disk,
        )
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
        return (
            num_experts_of(name, shape=shape, expert_parameters=self.metadata.expert_parameters) > 0
        )

    def _block(self, item: WriteItem, *, file: str) -> StoredBlock:
        data = _tensor_data(item)
        where, split = (
            (tuple(data.chunk.offsets), tuple(data.chunk.sizes)),
            self._is_split_by_expert(item),
        )
        key = block_key(item.index.fqn, block=where, shape=tuple(data.size), split=split)
        return StoredBlock(file, key, *where)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        blocks: dict[str, list[StoredBlock]] = defaultdict(list)
        entries: dict[str, FileEntry] = {}
        for result in (one for of_rank in results for one in of_rank):
            wrote = result.storage_data
            blocks[result.index.fqn].append(wrote.block)
            entries[wrote.block.file] = wrote.entry
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
                    f"{path}: written by its rank but not seen by rank 0. Expected one directory "
                    "that every rank sees: use a file system shared by all machines."
                )

    @contextmanager
    def _raise_disk_errors(self) -> Iterator[None]:
        """Say what the disk refused here, where all of it is known; it is raised on every rank."""
        try:
            yield
        except OSError as error:
            who = f"on rank {self.world.rank}" if self.world.size > 1 else ""
            raise self.paths.disk_error(error, disk=self.disk, rank=who) from None

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
    for path, held in sorted(metadata.state_dict_metadata.items()):
        if not isinstance(held, TensorStorageMetadata):
            continue
        file, _, name = path.partition("/")
        shape, found = tuple(held.size), sorted(blocks.get(path, ()), key=lambda b: b.offset)
        experts = num_experts_of(name, shape=shape, expert_parameters=expert_parameters)
        stored = StoredTensor(
            shape, held.properties.dtype, tuple(found), experts, split_by_expert=experts > 0
        )
        files.setdefault(file, {})[name] = stored
    return BlockIndex(files)
