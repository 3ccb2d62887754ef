"""Sharded checkpoint: saved by all ranks at once, in the background or not; loaded under any plan.

The directory and its manifest are those of ``checkpoint_directory.py``; all ranks must share it.
``block_index.py`` has the format. Functions are collective: all ranks call them in the same order.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import replace
from itertools import chain
from pathlib import Path
from threading import Thread
from typing import Any

from moesaic.checkpoint.block_index import StoredTensor, first_few, read_index
from moesaic.checkpoint.checkpoint_directory import (
    OVERHEAD_BYTES,
    CheckpointMetadata,
    CheckpointPaths,
    Disk,
    RetentionPolicy,
    encode_state,
    list_checkpoints,
)
from moesaic.checkpoint.checkpoint_ranks import COLLECTIVE_TIMEOUT_S, CheckpointRanks
from moesaic.checkpoint.full_checkpoint import (
    LatestCheckpoint,
    list_available,
    read_verified_state,
    unreadable_after,
)
from moesaic.checkpoint.manifest import file_problems, raise_if_damaged, read_manifest
from moesaic.checkpoint.sharded_save import OfferedTensor, ShardedSave
from moesaic.checkpoint.snapshot import RankSnapshot, Shard, ShardBlock, ShardFiles, as_shard
from moesaic.checkpoint.stored_weights import StoredWeights, reject_pickles
from moesaic.checkpoint.tensor_reader import open_reader
from moesaic.core.errors import CheckpointError
from moesaic.distributed.rank0 import run_on_rank0
from moesaic.distributed.world import World


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
    with CheckpointRanks.open(world) as ranks:
        ranks.run(lambda: _verify_files_of_rank(path, world=world))


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
    wanted = {
        f"{file}/{name}": as_shard(tensor)
        for file, tensors in into.items()
        for name, tensor in tensors.items()
    }
    with CheckpointRanks.open(world) as ranks, open_reader(path) as reader:
        index = ranks.run(lambda: read_index(path, manifest=read_manifest(path)))
        raise_if_damaged(path, index.problems())
        stored = {f"{file}/{name}": tensor for file, name, tensor in index}
        ranks.exchange(
            lambda: _fitting_names(stored, wanted, path=path),
            at_rank0=lambda names: _require_used(stored, names, path=path),
        )
        ranks.run(lambda: StoredWeights(stored, reader).read_into(wanted))
    return read_verified_state(path)


def _fitting_names(
    stored: Mapping[str, StoredTensor], wanted: Mapping[str, Shard], *, path: Path
) -> list[str]:
    """Return the names that a rank loads. Raises CheckpointError unless each of them fits."""
    problems = []
    for name, shard in wanted.items():
        found = stored.get(name)
        if found is None:
            problems.append(f"{name} is not in it")
            continue
        # floating-point numbers are rounded: a run may resume in another precision
        floats = found.dtype.is_floating_point and shard.dtype.is_floating_point
        if found.shape != shard.shape or not (floats or found.dtype == shard.dtype):
            here, there = (OfferedTensor(t.shape, t.dtype, ()) for t in (shard, found))
            problems.append(f"{name} is {there} in it, expected {here}")
    _require_no_problems(problems, path=path)
    return list(wanted)


def _require_used(
    stored: Mapping[str, StoredTensor], names: list[list[str]], *, path: Path
) -> list[None]:
    """Raise CheckpointError for a tensor of a kind that is loaded, but which no rank has."""
    wanted = set(chain.from_iterable(names))
    kinds = {name.partition("/")[0] for name in wanted}
    unused = (name for name in stored if name.partition("/")[0] in kinds and name not in wanted)
    problems = [f"{name} is in it, but not in the model of any rank" for name in unused]
    _require_no_problems(problems, path=path)
    return [None] * len(names)


def _require_no_problems(problems: Sequence[str], *, path: Path) -> None:
    if problems:
        raise CheckpointError(f"{path}: the checkpoint does not fit: {first_few(problems)}")


def copy_to_host(files: ShardFiles) -> ShardFiles:
    """Return a copy of a rank's shards in host memory."""
    return {
        file: {name: _copy_shard(as_shard(tensor)) for name, tensor in tensors.items()}
        for file, tensors in files.items()
    }


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
        self._ranks = CheckpointRanks.open(world, timeout_s=timeout_s)
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
        copy = replace(snapshot, files=copy_to_host(snapshot.files), state=deepcopy(snapshot.state))
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
            self._ranks.close()

    def _write(self, snapshot: RankSnapshot, retention: RetentionPolicy) -> Path:
        disk, text = self._disk, encode_state(snapshot.state)
        paths = CheckpointPaths(self.root, snapshot.step, len(text) + OVERHEAD_BYTES)
        metadata = CheckpointMetadata(
            snapshot.step, text, snapshot.expert_parameters, snapshot.plan
        )
        save = ShardedSave(
            paths, metadata=metadata, retention=retention, ranks=self._ranks, disk=disk
        )
        return save.write(snapshot.files)

    def _write_into(
        self, future: Future[Path], snapshot: RankSnapshot, retention: RetentionPolicy
    ) -> None:
        try:
            future.set_result(self._write(snapshot, retention))
        except BaseException as error:
            future.set_exception(error)
