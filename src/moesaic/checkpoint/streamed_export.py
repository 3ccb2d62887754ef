"""Streamed export: the weights of a checkpoint as one safetensors file, written by all ranks.

Each rank reads a contiguous range of the file's bytes from the checkpoint, a bounded piece at a
time, and writes it in place. No rank holds a model, under any plan.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from moesaic.checkpoint.checkpoint_directory import Disk
from moesaic.checkpoint.safetensors_io import TensorFileLayout, tensor_bytes
from moesaic.checkpoint.sharded_checkpoint import close_group, open_group, run_on_all_ranks
from moesaic.checkpoint.snapshot import Shard
from moesaic.checkpoint.stored_weights import StoredWeights, open_weights
from moesaic.core.errors import CheckpointError
from moesaic.core.files import os_errors_named
from moesaic.core.shapes import Tensor
from moesaic.distributed.world import World

PIECE_BYTES = 64 * 2**20  # of one write; a single row of a tensor may have more


def export_checkpoint_weights(
    path: Path,
    *,
    source: Path,
    dtypes: Mapping[str, torch.dtype],
    metadata: Mapping[str, str],
    world: World,
    disk: Disk | None = None,
) -> None:
    """Write the weights of the checkpoint ``source`` to ``path``, atomically. Collective.

    All ranks share its directory. ``dtypes`` are those of tensors that are stored otherwise. Hashes
    are not checked. Raises CheckpointError on every rank: a damaged checkpoint, a full disk.
    """
    disk = disk or Disk()
    group = open_group(world)
    try:
        with open_weights(source) as stored:
            export = _Export(path, stored, dtypes=dtypes, metadata=metadata, disk=disk)
            try:
                for step in (export.create, export.write, export.publish):  # each on all ranks
                    run_on_all_ranks(lambda step=step: step(world), world=world, group=group)
            except CheckpointError:
                export.remove(world)
                raise
    finally:
        close_group(group)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of a tensor from ``first`` on, at byte ``start`` of the file."""

    name: str
    first: int
    shape: tuple[int, ...]
    start: int


class _Export:
    """A file that is being written under another name, and where its values are read."""

    def __init__(
        self,
        path: Path,
        stored: StoredWeights,
        *,
        dtypes: Mapping[str, torch.dtype],
        metadata: Mapping[str, str],
        disk: Disk,
    ) -> None:
        self.path, self.stored, self.disk = path, stored, disk
        self.part = path.with_name(f".{path.name}.part")
        self.tensors = {
            name: torch.empty(each.shape, dtype=dtypes.get(name, each.dtype), device="meta")
            for name, each in stored.tensors.items()
        }
        self.layout = TensorFileLayout.of(self.tensors, metadata=metadata)

    def create(self, world: World) -> None:
        if world.rank == 0:
            with self._named_errors():
                self.disk.write(self.part, chunks=[self.layout.header])
                self.disk.resize(self.part, self.layout.size)

    def write(self, world: World) -> None:
        """Write the pieces that begin in this rank's range of the bytes."""
        chunks = ((piece.start, tensor_bytes(self._read(piece))) for piece in self._pieces(world))
        with self._named_errors():
            self.disk.write_at(self.part, chunks=chunks)

    def publish(self, world: World) -> None:
        if world.rank == 0:
            with self._named_errors():
                self.disk.rename(self.part, new=self.path)

    def remove(self, world: World) -> None:
        """Remove what was written of a file that could not be finished."""
        if world.rank == 0:
            with suppress(OSError):
                self.disk.remove(self.part)

    def _named_errors(self) -> AbstractContextManager[None]:
        return os_errors_named(self.path, action="could not be written", kind=CheckpointError)

    def _pieces(self, world: World) -> Iterator[_Piece]:
        begin = len(self.layout.header)
        share = max(1, -(-(self.layout.size - begin) // world.size))
        for name, start in self.layout.starts.items():
            shape = tuple(self.tensors[name].shape)
            rows = shape[0] if shape else 1
            row_bytes = math.prod(shape[1:]) * self.tensors[name].element_size()
            rows_at_once = max(1, PIECE_BYTES // max(row_bytes, 1))
            for first in range(0, rows, rows_at_once):
                at = start + first * row_bytes
                count = min(rows_at_once, rows - first)
                if (at - begin) // share == world.rank:
                    yield _Piece(name, first, (count, *shape[1:]) if shape else (), at)

    def _read(self, piece: _Piece) -> Tensor:
        whole = self.tensors[piece.name]
        data = torch.empty(piece.shape, dtype=whole.dtype)
        offset = (piece.first, *(0 for _ in piece.shape[1:])) if piece.shape else ()
        shard = Shard.from_block(data, offset=offset, shape=tuple(whole.shape))
        self.stored.read_into({piece.name: shard})
        return data
