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

from moesaic.checkpoint.disk import Disk
from moesaic.checkpoint.index import (
    INDEX,
    Block,
    Index,
    Shape,
    Stored,
    bank_size,
    block_key,
    gaps,
    some,
)
from moesaic.checkpoint.manifest import FileEntry
from moesaic.checkpoint.publish import Head, Keep, Place, complete, publish, write_hashed
from moesaic.checkpoint.shard import Files, Piece, Shard, as_shard
from moesaic.checkpoint.tensors import tensor_pieces
from moesaic.core.errors import CheckpointError
from moesaic.core.shapes import Tensor
from moesaic.dist.world import World

State = Mapping[str, Shard]  # by path, ``model/encoder.0...``: what DCP calls a state dict


def as_state(files: Files, *, banks: Mapping[str, int]) -> dict[str, Shard]:
    """Return what a rank holds by path: pieces of banks one expert long, nothing empty."""
    return {
        f"{file}/{name}": _told_apart(as_shard(held), bank=_is_bank(name, held, banks=banks))
        for file, tensors in files.items()
        for name, held in tensors.items()
    }


def _is_bank(name: str, held: Any, *, banks: Mapping[str, int]) -> bool:
    return bank_size(name, shape=tuple(held.shape), banks=banks) > 0


def _told_apart(shard: Shard, *, bank: bool) -> Shard:
    pieces = (piece for piece in shard.pieces if piece.data.numel())
    if not bank:
        return replace(shard, pieces=tuple(pieces))
    alone = (
        Piece((piece.offset[0] + i, *piece.offset[1:]), piece.data[i : i + 1])
        for piece in pieces
        for i in range(len(piece.data))
    )
    return replace(shard, pieces=tuple(alone))


class PiecePlanner(SavePlanner):
    """Every block is written once, by the holder of it that has the fewest bytes to write."""

    def __init__(self, banks: Mapping[str, int]) -> None:
        self._banks = banks

    def set_up_planner(
        self,
        state_dict: State,
        storage_meta: Any = None,  # noqa: ARG002
        is_coordinator: bool = False,  # noqa: ARG002, FBT001, FBT002
    ) -> None:
        self._state = state_dict
        self._data = {
            (path, piece.offset): piece.data
            for path, shard in state_dict.items()
            for piece in shard.pieces
        }

    def create_local_plan(self) -> SavePlan:
        items = [
            _write_item(path, shard=shard, piece=piece)
            for path, shard in self._state.items()
            for piece in shard.pieces
        ]
        heads = {path: (shard.shape, shard.dtype) for path, shard in self._state.items()}
        return SavePlan(items, planner_data=heads)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        heads = _one_head([plan.planner_data for plan in all_plans])
        plans = [replace(plan, planner_data=None) for plan in _once(all_plans)]
        plans, metadata = create_default_global_save_plan(plans)
        for path, (shape, dtype) in heads.items():
            if not math.prod(shape):  # nobody writes it, but it is there
                head = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])
                metadata.state_dict_metadata[path] = head
        _require_cover(heads, metadata=metadata, banks=self._banks)
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._data[_address(write_item.index)]


def _write_item(path: str, *, shard: Shard, piece: Piece) -> WriteItem:
    offset, size = torch.Size(piece.offset), piece.data.shape
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(offset, size),
        properties=TensorProperties(dtype=shard.dtype),
        size=torch.Size(shard.shape),
    )
    return WriteItem(MetadataIndex(path, offset), WriteItemType.SHARD, tensor_data=data)


def _address(index: MetadataIndex) -> tuple[str, Shape]:
    return index.fqn, tuple(index.offset or ())


def _tensor_data(item: WriteItem) -> TensorWriteData:
    if item.tensor_data is None:
        raise TypeError(f"{item.index.fqn} is not a tensor")
    return item.tensor_data


def _item_bytes(item: WriteItem) -> int:
    """Bytes of the block that an item writes."""
    data = _tensor_data(item)
    return math.prod(data.chunk.sizes) * data.properties.dtype.itemsize


def _one_head(heads: Sequence[Mapping[str, tuple[Shape, torch.dtype]]]) -> dict[str, Any]:
    """Shape and dtype of every tensor that some rank knows; all ranks must say the same."""
    first: dict[str, tuple[int, Any]] = {}
    for rank, known in enumerate(heads):
        for path, head in known.items():
            one, other = first.setdefault(path, (rank, head))
            if other != head:
                raise CheckpointError(
                    f"{path} is {said(other)} on rank {one} but {said(head)} on rank {rank}: "
                    "ranks must agree on the whole tensor that they hold parts of"
                )
    return {path: head for path, (_, head) in first.items()}


def said(head: tuple[Shape, torch.dtype]) -> str:
    """Return shape and dtype for a message."""
    return f"{head[1]} {list(head[0])}"


def _once(plans: Sequence[SavePlan]) -> list[SavePlan]:
    """Leave each block in the plan of one of its holders."""
    holders: dict[tuple[str, Shape], list[tuple[int, WriteItem]]] = defaultdict(list)
    for rank, plan in enumerate(plans):
        for item in plan.items:
            holders[_address(item.index)].append((rank, item))
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


def _require_cover(
    heads: Mapping[str, tuple[Shape, torch.dtype]],
    *,
    metadata: Metadata,
    banks: Mapping[str, int],
) -> None:
    wrong = []
    for path, (shape, dtype) in heads.items():
        held = metadata.state_dict_metadata.get(path)
        chunks = held.chunks if isinstance(held, TensorStorageMetadata) else []
        blocks = (Block("a rank", path, tuple(c.offsets), tuple(c.sizes)) for c in chunks)
        experts = bank_size(path.partition("/")[2], shape=shape, banks=banks)
        stored = Stored(shape, dtype, tuple(blocks), experts, split=experts > 0)
        wrong += [f"{path}: {gap}" for gap in gaps(stored)]
    if wrong:
        raise CheckpointError(
            f"the ranks do not hold every tensor once and whole: {some(wrong)}. "
            "The layout of the model over the ranks is wrong; nothing was written."
        )


@dataclass(frozen=True, slots=True)
class _Wrote:
    """What became of one write item."""

    block: Block
    entry: FileEntry


class ShardWriter(StorageWriter):
    """One safetensors file per rank with something to write; the coordinator publishes."""

    def __init__(self, place: Place, *, head: Head, keep: Keep, world: World, disk: Disk) -> None:
        self.place, self.head, self.keep, self.world, self.disk = place, head, keep, world, disk
        self._serial = 0

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: FBT001
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        size = sum(_item_bytes(item) for plan in plans for item in plan.items)
        self.place = replace(self.place, needed=self.place.needed + size)
        with self._telling():
            self._serial = self.place.begin(self.disk)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        done: Future[list[WriteResult]] = Future()
        name = f"shard-{self.world.rank:05d}.safetensors"
        blocks = [self._block(item, file=name) for item in plan.items]
        tensors = {
            block.key: _stored_as(planner.resolve_data(item), split=self._splits(item))
            for block, item in zip(blocks, plan.items, strict=True)
        }
        results = []
        if blocks:
            with self._telling():
                entry = write_hashed(self.place.part / name, tensor_pieces(tensors), disk=self.disk)
            results = [
                WriteResult(item.index, _item_bytes(item), _Wrote(block, entry))
                for block, item in zip(blocks, plan.items, strict=True)
            ]
        done.set_result(results)
        return done

    def _splits(self, item: WriteItem) -> bool:
        shape = tuple(_tensor_data(item).size)
        name = item.index.fqn.partition("/")[2]
        return bank_size(name, shape=shape, banks=self.head.banks) > 0

    def _block(self, item: WriteItem, *, file: str) -> Block:
        data = _tensor_data(item)
        where, split = (tuple(data.chunk.offsets), tuple(data.chunk.sizes)), self._splits(item)
        key = block_key(item.index.fqn, block=where, shape=tuple(data.size), split=split)
        return Block(file, key, *where)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        blocks: dict[str, list[Block]] = defaultdict(list)
        entries: dict[str, FileEntry] = {}
        for result in (one for of_rank in results for one in of_rank):
            wrote = result.storage_data
            blocks[result.index.fqn].append(wrote.block)
            entries[wrote.block.file] = wrote.entry
        self._require_seen(entries)
        with self._telling():
            self._finish(_index(metadata, blocks=blocks, banks=self.head.banks), entries=entries)

    def _finish(self, index: Index, *, entries: dict[str, FileEntry]) -> None:
        text = index.text().encode()
        entries[INDEX] = write_hashed(self.place.part / INDEX, [text], disk=self.disk)
        complete(self.place, head=self.head, serial=self._serial, entries=entries, disk=self.disk)
        publish(self.place, keep=self.keep, disk=self.disk)

    def _require_seen(self, entries: Mapping[str, FileEntry]) -> None:
        for name, entry in entries.items():
            path = self.place.part / name
            if not path.is_file() or path.stat().st_size != entry.bytes:
                raise CheckpointError(
                    f"{path}: written by its rank but not seen by rank 0. Expected one directory "
                    "that every rank sees: use a file system shared by all machines."
                )

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Say what the disk refused here, where all of it is known; it is raised on every rank."""
        try:
            yield
        except OSError as error:
            who = f"on rank {self.world.rank}" if self.world.size > 1 else ""
            raise self.place.failure(error, disk=self.disk, who=who) from None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:  # noqa: ARG003
        return True


def _stored_as(data: Tensor | io.BytesIO, *, split: bool) -> Tensor:
    if not isinstance(data, Tensor):
        raise TypeError("only tensors are saved in shards")
    return data[0] if split else data


def _index(
    metadata: Metadata, *, blocks: Mapping[str, Sequence[Block]], banks: Mapping[str, int]
) -> Index:
    files: dict[str, dict[str, Stored]] = {}
    for path, held in sorted(metadata.state_dict_metadata.items()):
        if not isinstance(held, TensorStorageMetadata):
            continue
        file, _, name = path.partition("/")
        shape, found = tuple(held.size), sorted(blocks.get(path, ()), key=lambda b: b.offset)
        experts = bank_size(name, shape=shape, banks=banks)
        stored = Stored(shape, held.properties.dtype, tuple(found), experts, split=experts > 0)
        files.setdefault(file, {})[name] = stored
    return Index(files)
