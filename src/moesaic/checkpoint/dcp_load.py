"""Load planner and storage reader for ``torch.distributed.checkpoint`` (DCP).

Every rank lists the blocks of its shards; DCP finds the stored blocks that overlap them, whatever
plan they were saved from, and each rank reads those slices only.
"""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from moesaic.checkpoint.block_index import BlockIndex, StoredBlock, StoredTensor, first_few
from moesaic.checkpoint.dcp_save import ShardedStateDict, describe_tensor
from moesaic.checkpoint.tensor_reader import open_reader
from moesaic.core.errors import CheckpointError
from moesaic.core.shapes import Tensor


class BlockLoadPlanner(LoadPlanner):
    """Plans the slices that overlap the rank's own blocks; checks everything before reading."""

    def set_up_planner(
        self,
        state_dict: ShardedStateDict,
        metadata: Metadata | None = None,
        is_coordinator: bool = False,  # noqa: ARG002, FBT001, FBT002
    ) -> None:
        self._state = state_dict
        self._stored = {} if metadata is None else metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        problems: list[str] = []
        items: list[ReadItem] = []
        for path, shard in self._state.items():
            stored = self._stored.get(path)
            if not isinstance(stored, TensorStorageMetadata):
                problems.append(f"{path} is not in it")
                continue
            found = (tuple(stored.size), stored.properties.dtype)
            # floating-point numbers are rounded: a run may resume in another precision
            fits = (
                found[1] == shard.dtype
                or found[1].is_floating_point == shard.dtype.is_floating_point
            )
            if found[0] != shard.shape or not fits:
                want = describe_tensor((shard.shape, shard.dtype))
                problems.append(f"{path} is {describe_tensor(found)} in it, expected {want}")
                continue
            chunks = [
                ChunkStorageMetadata(torch.Size(p.offset), p.data.shape) for p in shard.blocks
            ]
            items += create_read_items_for_chunk_list(path, stored, chunks)
        if problems:
            raise CheckpointError(f"the checkpoint does not fit: {first_few(problems)}")
        return LoadPlan(items, planner_data=list(self._state))

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        requested = {path for plan in global_plan for path in plan.planner_data}
        kinds = {path.partition("/")[0] for path in requested}
        unused = [p for p in self._stored if p.partition("/")[0] in kinds and p not in requested]
        if unused:
            problems = [f"{path} is in it, but not in the model of any rank" for path in unused]
            raise CheckpointError(f"the checkpoint does not fit: {first_few(problems)}")
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:  # noqa: ARG002
        raise TypeError(f"{read_item.dest_index.fqn} is not a tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        index = read_item.dest_index
        target = self._state[index.fqn].blocks[index.index or 0].data.detach()
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            target = target.narrow(dim, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class SafetensorsStorageReader(StorageReader):
    """Reads the slices of a plan, file by file."""

    def __init__(self, directory: Path, *, index: BlockIndex) -> None:
        self.directory = directory
        self._stored = {f"{file}/{name}": stored for file, name, stored in index}

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ARG002
        return Metadata({path: _tensor_metadata(stored) for path, stored in self._stored.items()})

    def set_up_storage_reader(
        self,
        metadata: Metadata,
        is_coordinator: bool,  # noqa: FBT001
        *args: Any,
        **kwargs: Any,
    ) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @torch.no_grad()
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        with open_reader(self.directory) as reader:
            for stored, block, item in self._by_file(plan.items):
                start, shape = tuple(item.storage_offsets), tuple(item.lengths)
                target = planner.resolve_tensor(item)
                target.copy_(reader.read_slice(stored, block=block, start=start, shape=shape))
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _by_file(
        self, items: Iterable[ReadItem]
    ) -> Iterator[tuple[StoredTensor, StoredBlock, ReadItem]]:
        reads = []
        for item in items:
            stored = self._stored[item.storage_index.fqn]
            reads.append((stored, stored.blocks[item.storage_index.index or 0], item))
        yield from sorted(reads, key=lambda one: (one[1].file, one[1].key))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:  # noqa: ARG003
        return True


def _tensor_metadata(stored: StoredTensor) -> TensorStorageMetadata:
    chunks = [
        ChunkStorageMetadata(torch.Size(b.offset), torch.Size(b.shape)) for b in stored.blocks
    ]
    return TensorStorageMetadata(
        TensorProperties(dtype=stored.dtype), torch.Size(stored.shape), chunks
    )
