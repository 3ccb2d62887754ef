"""Saver: sharded checkpoints, written while training goes on or while it waits.

In the background a save is a copy of what this rank holds to host memory, then a thread. One save
is under way at a time.
"""

from concurrent.futures import Future
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from threading import Thread

from moesaic.checkpoint.disk import Disk
from moesaic.checkpoint.publish import RetentionPolicy
from moesaic.checkpoint.sharded import (
    COLLECTIVE_TIMEOUT_S,
    close_group,
    copy_to_host,
    open_group,
    write_shards,
)
from moesaic.checkpoint.snapshot import RankSnapshot
from moesaic.dist.world import World


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
            self.root, snapshot, world=self.world, group=self._group, retention=keep, disk=self._disk
        )

    def _write_into(self, future: Future[Path], snapshot: RankSnapshot, keep: RetentionPolicy) -> None:
        try:
            future.set_result(self._write(snapshot, keep))
        except BaseException as error:
            future.set_exception(error)
