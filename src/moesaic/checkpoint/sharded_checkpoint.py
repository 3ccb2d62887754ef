"""Sharded checkpoint: saved by all ranks at once, in the background or not; loaded under any plan.

The directory and its manifest are those of ``checkpoint_directory.py``; all ranks must share it.
``block_index.py`` has the format. Functions are collective: all ranks call them in the same order.
"""

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch.distributed as distributed
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from moesaic.checkpoint.block_index import read_index
from moesaic.checkpoint.checkpoint_directory import (
    OVERHEAD_BYTES,
    CheckpointMetadata,
    CheckpointPaths,
    Disk,
    RetentionPolicy,
    encode_state,
    list_checkpoints,
)
from moesaic.checkpoint.dcp_load import BlockLoadPlanner, SafetensorsStorageReader
from moesaic.checkpoint.dcp_save import BalancedSavePlanner, SafetensorsStorageWriter, to_state_dict
from moesaic.checkpoint.full_checkpoint import (
    LatestCheckpoint,
    list_available,
    read_verified_state,
    unreadable_after,
)
from moesaic.checkpoint.manifest import file_problems, raise_if_damaged, read_manifest
from moesaic.checkpoint.snapshot import (
    RankSnapshot,
    Shard,
    ShardBlock,
    ShardFiles,
    TensorOrShard,
    as_shard,
)
from moesaic.checkpoint.stored_weights import reject_pickles
from moesaic.core.errors import CheckpointError
from moesaic.distributed.rank0 import run_on_rank0
from moesaic.distributed.world import World

COLLECTIVE_TIMEOUT_S = 1800.0  # how long ranks wait for the slowest disk
ProcessGroupOrNone = Any  # a torch process group, or None for a single process
Value = TypeVar("Value")


def open_group(world: World, *, timeout_s: float = COLLECTIVE_TIMEOUT_S) -> ProcessGroupOrNone:
    """Return a gloo process group of all ranks for checkpoints. Collective.

    A separate group allows saving in the background, independent of training's collectives and of
    the GPU. None for a single process.
    """
    if world.size == 1:
        return None
    return distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))


def close_group(group: ProcessGroupOrNone) -> None:
    """Destroy a group of ``open_group``."""
    if group is not None:
        distributed.destroy_process_group(group)


def load_sharded(path: Path, *, into: ShardFiles, world: World) -> dict[str, Any]:
    """Load a checkpoint of either form into the shards of ``into``; return its state. Collective.

    The checkpoint may be of any plan and number of ranks. Every rank first hashes a part of the
    files; nothing is loaded if one is damaged. For each kind of file in ``into``, its tensors and
    those of the checkpoint must be the same. Raises CheckpointError on every rank, naming what is
    missing, altered, not covered or of another shape.
    """
    verify_on_all_ranks(path, world=world)
    return load_verified(path, into=into, world=world)


def verify_on_all_ranks(path: Path, *, world: World) -> None:
    """Hash each file of a checkpoint on one of the ranks, about as many bytes on each. Collective.

    Raises CheckpointError on every rank, naming each file that is missing, truncated or altered,
    or a pickle.
    """
    group = open_group(world)
    try:
        run_on_all_ranks(lambda: _verify_files_of_rank(path, world=world), world=world, group=group)
    finally:
        close_group(group)


def find_verified_checkpoint(root: Path, *, world: World) -> LatestCheckpoint:
    """Find the newest checkpoint under ``root`` whose files are as they were saved. Collective.

    Each file is hashed once, on one of the ranks (``verify_on_all_ranks``).
    """
    skipped: list[str] = []
    names = run_on_rank0(world, lambda: [path.name for path in list_checkpoints(root)])
    for path in (root / name for name in names):
        try:
            verify_on_all_ranks(path, world=world)
        except CheckpointError as error:
            skipped.append(str(error))
        else:
            newer = run_on_rank0(world, lambda path=path: list(unreadable_after(path)))
            return LatestCheckpoint(path, (*skipped, *newer))
    return LatestCheckpoint(None, tuple(skipped))


def load_verified(path: Path, *, into: ShardFiles, world: World) -> dict[str, Any]:
    """Load a checkpoint whose files have been hashed, as ``load_sharded`` does. Collective."""
    group = open_group(world)
    try:
        index = run_on_all_ranks(
            lambda: read_index(path, manifest=read_manifest(path)), world=world, group=group
        )
        raise_if_damaged(path, index.problems())
        state = {
            f"{file}/{name}": as_shard(tensor)
            for file, tensors in into.items()
            for name, tensor in tensors.items()
        }
        with _unwrap_rank_errors(group, where=f"{path}: "):
            state_dict_loader.load(
                dict(state),
                storage_reader=SafetensorsStorageReader(path, index=index),
                planner=BlockLoadPlanner(),
                process_group=group,
                no_dist=group is None,
            )
    finally:
        close_group(group)
    return read_verified_state(path)


def copy_to_host(snapshot: RankSnapshot) -> ShardFiles:
    """Return copies of a rank's shards in host memory; what is frozen is not copied."""

    def kept(file: str, name: str, tensor: TensorOrShard) -> TensorOrShard:
        return tensor if (file, name) in snapshot.frozen else _copy_shard(as_shard(tensor))

    return {
        file: {name: kept(file, name, tensor) for name, tensor in tensors.items()}
        for file, tensors in snapshot.files.items()
    }


def run_on_all_ranks(
    action: Callable[[], Value], *, world: World, group: ProcessGroupOrNone
) -> Value:
    """Run ``action`` on every rank; a CheckpointError of one is raised on all. Collective."""
    result, error = None, ""
    try:
        result = action()
    except (CheckpointError, OSError) as raised:
        error = str(raised)
    errors = [error]
    if group is not None:
        errors = [""] * world.size
        distributed.all_gather_object(errors, error, group=group)
    if any(errors):
        raise CheckpointError(" | ".join(dict.fromkeys(e for e in errors if e)))
    return result  # pyright: ignore[reportReturnType] - no rank raised, so it is set


def _verify_files_of_rank(path: Path, *, world: World) -> None:
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint{list_available(path.parent)}")
    if world.rank == 0:
        reject_pickles(path)
    manifest = read_manifest(path)
    largest = sorted(manifest.files, key=lambda name: (-manifest.files[name].bytes, name))
    names = largest[world.rank :: world.size]
    raise_if_damaged(path, file_problems(path, manifest=manifest, names=names))


def _copy_shard(shard: Shard) -> Shard:
    blocks = (ShardBlock(b.offset, b.data.detach().to("cpu", copy=True)) for b in shard.blocks)
    return Shard(shard.shape, shard.dtype, tuple(blocks))


@contextmanager
def _unwrap_rank_errors(group: ProcessGroupOrNone, *, where: str = "") -> Iterator[None]:
    """Raise the error of a rank itself instead of DCP's CheckpointException."""
    try:
        with warnings.catch_warnings() if group is None else nullcontext():
            if group is None:  # DCP warns about a single process
                warnings.simplefilter("ignore")
            yield
    except CheckpointException as error:
        raised = {rank: found[0] for rank, found in error.failures.items()}
        known = [str(e) for e in raised.values() if isinstance(e, CheckpointError)]
        if len(known) == len(raised):
            raise CheckpointError(where + " | ".join(dict.fromkeys(known))) from None
        raise next(e for e in raised.values() if not isinstance(e, CheckpointError)) from error


class CheckpointSaver:
    """Saves sharded checkpoints into ``root``. Every rank makes the same calls in the same order.

    ``save_async`` returns once the state is copied to host memory, and a thread writes it; call
    ``poll`` after every step: it raises errors of the background save on every rank at the same
    step. ``save`` and ``wait`` return when the checkpoint is visible.
    """

    def __init__(
        self,
        root: Path,
        *,
        world: World,
        timeout_s: float = COLLECTIVE_TIMEOUT_S,
        disk: Disk | None = None,
    ) -> None:
        self.root, self.world, self._disk = root, world, disk or Disk()
        self._group = open_group(world, timeout_s=timeout_s)
        self._pending: Future[Path] | None = None

    def save(self, snapshot: RankSnapshot, *, retention: RetentionPolicy) -> Path:
        """Write ``root/step-N`` atomically and return it. Collective.

        Raises CheckpointError on every rank for a disk error on any, or if the shards do not cover
        every tensor; the earlier checkpoints are then unchanged.
        """
        self.wait()
        return self._write(snapshot, retention)

    def save_async(self, snapshot: RankSnapshot, *, retention: RetentionPolicy) -> None:
        """Copy the state and write it in the background; waits for the previous save.
        Collective."""
        self.wait()
        copy = replace(snapshot, files=copy_to_host(snapshot), state=deepcopy(snapshot.state))
        future: Future[Path] = Future()
        # a daemon: a process that exits must not wait for a rank that is dead
        Thread(target=self._write_into, args=(future, copy, retention), daemon=True).start()
        self._pending = future

    def poll(self) -> Path | None:
        """Return the checkpoint that was finished since the last call, or None.

        Collective while a save is pending (one number is summed), so that all ranks see its end, or
        its error, at the same step. Raises CheckpointError.
        """
        if self._pending is None or self.world.any_rank(not self._pending.done()):
            return None
        return self.wait()

    def wait(self) -> Path | None:
        """Wait for the pending save, if any, and return its directory. Raises CheckpointError."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        return pending.result()

    def close(self) -> None:
        """Wait for the pending save and destroy the group. Collective."""
        try:
            self.wait()
        finally:
            close_group(self._group)

    def _write(self, snapshot: RankSnapshot, retention: RetentionPolicy) -> Path:
        disk, text = self._disk, encode_state(snapshot.state)
        paths = CheckpointPaths(self.root, snapshot.step, len(text) + OVERHEAD_BYTES)
        metadata = CheckpointMetadata(
            snapshot.step, text, snapshot.expert_parameters, snapshot.plan
        )
        writer = SafetensorsStorageWriter(
            paths, metadata=metadata, retention=retention, world=self.world, disk=disk
        )
        state = to_state_dict(snapshot.files, expert_parameters=snapshot.expert_parameters)
        try:
            with _unwrap_rank_errors(self._group):
                state_dict_saver.save(
                    dict(state),
                    storage_writer=writer,
                    planner=BalancedSavePlanner(snapshot.expert_parameters),
                    process_group=self._group,
                    no_dist=self._group is None,
                )
        except CheckpointError:
            if self.world.rank == 0:
                paths.remove_staging(disk)
            raise
        return paths.final

    def _write_into(
        self, future: Future[Path], snapshot: RankSnapshot, retention: RetentionPolicy
    ) -> None:
        try:
            future.set_result(self._write(snapshot, retention))
        except BaseException as error:
            future.set_exception(error)
