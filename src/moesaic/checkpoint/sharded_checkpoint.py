"""Sharded: one checkpoint written by many ranks at once, and read under any other plan.

The directory, its manifest, pointers and pruning are those of ``save.py``; every rank must see it.
``index.py`` has the format. Each call is collective: all ranks of ``world`` make it, in one order.

Saver: sharded checkpoints, written while training goes on or while it waits.

In the background a save is a copy of what this rank holds to host memory, then a thread. One save
is under way at a time.
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

from moesaic.checkpoint.block_index import coverage_problems, first_few, read_index
from moesaic.checkpoint.checkpoint_directory import (
    OVERHEAD_BYTES,
    CheckpointMetadata,
    CheckpointPaths,
    Disk,
    Manifest,
    RetentionPolicy,
    encode_state,
    file_problems,
    raise_if_damaged,
    read_manifest,
)
from moesaic.checkpoint.dcp_load import BlockLoadPlanner, SafetensorsStorageReader
from moesaic.checkpoint.dcp_save import BalancedSavePlanner, SafetensorsStorageWriter, to_state_dict
from moesaic.checkpoint.full_checkpoint import read_state
from moesaic.checkpoint.snapshot import RankSnapshot, Shard, ShardBlock, ShardFiles, as_shard
from moesaic.core.errors import CheckpointError
from moesaic.distributed.world import World

COLLECTIVE_TIMEOUT_S = 1800.0  # the slowest disk may keep the others waiting this long


ProcessGroupOrNone = Any  # torch's process group, or None for a world of one


Value = TypeVar("Value")


def open_group(world: World, *, timeout_s: float = COLLECTIVE_TIMEOUT_S) -> ProcessGroupOrNone:
    """Return a gloo group of all ranks for checkpoints alone. Collective.

    A group of its own lets a save go on in the background: its messages cannot be taken for those
    of training, and it needs no GPU. None for a world of one.
    """
    if world.size == 1:
        return None
    return distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))


def close_group(group: ProcessGroupOrNone) -> None:
    """Leave a group of ``open_group``."""
    if group is not None:
        distributed.destroy_process_group(group)


def save_sharded(
    root: Path,
    snapshot: RankSnapshot,
    *,
    world: World,
    retention: RetentionPolicy = RetentionPolicy(),  # noqa: B008 - a frozen value
    disk: Disk | None = None,
) -> Path:
    """Write ``root/step-N`` whole or not at all, every block by one of its holders; return it.

    Raises CheckpointError on every rank if a disk refuses on any (with that rank), or if the shards
    do not make up whole tensors; the earlier checkpoints are then as they were.
    """
    group = open_group(world)
    try:
        return write_shards(
            root, snapshot, world=world, group=group, retention=retention, disk=disk
        )
    finally:
        close_group(group)


def write_shards(
    root: Path,
    snapshot: RankSnapshot,
    *,
    world: World,
    group: ProcessGroupOrNone,
    retention: RetentionPolicy,
    disk: Disk | None = None,
) -> Path:
    """Do what ``save_sharded`` says, in a group that is there."""
    disk = disk or Disk()
    text = encode_state(snapshot.state)
    place = CheckpointPaths(root, snapshot.step, len(text) + OVERHEAD_BYTES)
    head = CheckpointMetadata(snapshot.step, text, snapshot.expert_parameters, snapshot.plan)
    writer = SafetensorsStorageWriter(
        place, metadata=head, retention=retention, world=world, disk=disk
    )
    state = to_state_dict(snapshot.files, expert_parameters=snapshot.expert_parameters)
    try:
        with _unwrap_rank_errors(group):
            state_dict_saver.save(
                dict(state),
                storage_writer=writer,
                planner=BalancedSavePlanner(snapshot.expert_parameters),
                process_group=group,
                no_dist=group is None,
            )
    except CheckpointError:
        if world.rank == 0:
            place.remove_staging(disk)
        raise
    return place.final


def load_sharded(path: Path, *, into: ShardFiles, world: World) -> dict[str, Any]:
    """Fill the shards and tensors of ``into`` from a checkpoint of either form; return its state.

    The checkpoint may be of any plan and number of ranks. Every rank hashes its part of the files
    first; nothing is written unless all of them are whole. A tensor of a kind of file that is asked
    for must have a place on some rank, and every place must be filled. Raises CheckpointError, on
    every rank, naming what is missing, altered, uncovered or of another shape.
    """
    group = open_group(world)
    try:
        manifest = run_on_all_ranks(
            lambda: _verify_files_of_rank(path, world=world), world=world, group=group
        )
        index = run_on_all_ranks(
            lambda: read_index(path, manifest=manifest), world=world, group=group
        )
        wrong = [f"{f}/{n}: {gap}" for f, n, stored in index for gap in coverage_problems(stored)]
        raise_if_damaged(path, [first_few(wrong)] if wrong else [])
        state = {
            f"{file}/{name}": as_shard(held)
            for file, tensors in into.items()
            for name, held in tensors.items()
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
    return read_state(path)


def copy_to_host(files: ShardFiles) -> ShardFiles:
    """Return a copy of what a rank holds, in memory that training does not touch."""
    return {
        file: {name: _copy_shard(as_shard(held)) for name, held in tensors.items()}
        for file, tensors in files.items()
    }


def run_on_all_ranks(
    action: Callable[[], Value], *, world: World, group: ProcessGroupOrNone
) -> Value:
    """Run ``action`` on every rank; a CheckpointError of any is raised on all. Collective."""
    found, error = None, ""
    try:
        found = action()
    except (CheckpointError, OSError) as raised:
        error = str(raised)
    errors = [error]
    if group is not None:
        errors = [""] * world.size
        distributed.all_gather_object(errors, error, group=group)
    if any(errors):
        raise CheckpointError(" | ".join(dict.fromkeys(e for e in errors if e)))
    return found  # pyright: ignore[reportReturnType] - no rank raised, so it is there


def _verify_files_of_rank(path: Path, *, world: World) -> Manifest:
    manifest = read_manifest(path)
    largest = sorted(manifest.files, key=lambda name: (-manifest.files[name].bytes, name))
    mine = largest[world.rank :: world.size]
    raise_if_damaged(path, file_problems(path, manifest=manifest, names=mine))
    return manifest


def _copy_shard(shard: Shard) -> Shard:
    pieces = (ShardBlock(p.offset, p.data.detach().to("cpu", copy=True)) for p in shard.blocks)
    return Shard(shard.shape, shard.dtype, tuple(pieces))


@contextmanager
def _unwrap_rank_errors(group: ProcessGroupOrNone, *, where: str = "") -> Iterator[None]:
    """Raise what a rank raised as it was, instead of inside the engine's own exception."""
    try:
        with warnings.catch_warnings() if group is None else nullcontext():
            if group is None:  # it warns that nobody else takes part
                warnings.simplefilter("ignore")
            yield
    except CheckpointException as error:
        raised = {rank: found[0] for rank, found in error.failures.items()}
        known = [str(e) for e in raised.values() if isinstance(e, CheckpointError)]
        if len(known) == len(raised):
            raise CheckpointError(where + " | ".join(dict.fromkeys(known))) from None
        raise next(e for e in raised.values() if not isinstance(e, CheckpointError)) from error


class CheckpointSaver:
    """Saves into ``root``. Made, called and closed by every rank at the same points of the run.

    ``start`` returns as soon as the state is copied; call ``poll`` after every step: it raises, on
    every rank at the same step, what a save in the background met. ``save`` and ``wait`` return
    when the checkpoint is visible.
    """

    def __init__(
        self,
        root: Path,
        *,
        world: World,
        timeout_s: float = COLLECTIVE_TIMEOUT_S,
        disk: Disk | None = None,
    ) -> None:
        self.root, self.world, self._disk = root, world, disk
        self._group = open_group(world, timeout_s=timeout_s)
        self._pending: Future[Path] | None = None

    def save(self, snapshot: RankSnapshot, *, retention: RetentionPolicy) -> Path:
        """Write a checkpoint and return its directory. Collective."""
        self.wait()
        return self._write(snapshot, retention)

    def save_async(self, snapshot: RankSnapshot, *, retention: RetentionPolicy) -> None:
        """Copy the state and begin to write it; waits for the save before. Collective."""
        self.wait()
        copy = replace(snapshot, files=copy_to_host(snapshot.files), state=deepcopy(snapshot.state))
        future: Future[Path] = Future()
        # a daemon: a process that has to end must not wait for a rank that is gone
        Thread(target=self._write_into, args=(future, copy, retention), daemon=True).start()
        self._pending = future

    def poll(self) -> Path | None:
        """Return the checkpoint that has become visible since the last call, if one has.

        Collective while a save is under way (one number is summed), so that its end, or its error,
        is met by all ranks at the same step. Raises CheckpointError.
        """
        if self._pending is None or self.world.any_rank(not self._pending.done()):
            return None
        return self.wait()

    def wait(self) -> Path | None:
        """Wait for the save under way, if there is one, and return its directory.

        Raises what it met: CheckpointError where a disk refused.
        """
        if self._pending is None:
            return None
        under_way, self._pending = self._pending, None
        return under_way.result()

    def close(self) -> None:
        """Wait for the save under way and leave the group. Collective."""
        try:
            self.wait()
        finally:
            close_group(self._group)

    def _write(self, snapshot: RankSnapshot, keep: RetentionPolicy) -> Path:
        return write_shards(
            self.root,
            snapshot,
            world=self.world,
            group=self._group,
            retention=keep,
            disk=self._disk,
        )

    def _write_into(
        self, future: Future[Path], snapshot: RankSnapshot, keep: RetentionPolicy
    ) -> None:
        try:
            future.set_result(self._write(snapshot, keep))
        except BaseException as error:
            future.set_exception(error)
