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
from moesaic.checkpoint.publish import Keep
from moesaic.checkpoint.sharded import (
    PATIENCE_S,
    close_group,
    on_host,
    open_group,
    write_shards,
)
from moesaic.checkpoint.snapshot import RankSnapshot
from moesaic.dist.world import World


class Saver:
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
        patience_s: float = PATIENCE_S,
        disk: Disk | None = None,
    ) -> None:
        self.root, self.world, self._disk = root, world, disk
        self._group = open_group(world, patience_s=patience_s)
        self._under_way: Future[Path] | None = None

    def save(self, snapshot: RankSnapshot, *, keep: Keep) -> Path:
        """Write a checkpoint and return its directory. Collective."""
        self.wait()
        return self._write(snapshot, keep)

    def start(self, snapshot: RankSnapshot, *, keep: Keep) -> None:
        """Copy the state and begin to write it; waits for the save before. Collective."""
        self.wait()
        copy = replace(snapshot, files=on_host(snapshot.files), state=deepcopy(snapshot.state))
        future: Future[Path] = Future()
        # a daemon: a process that has to end must not wait for a rank that is gone
        Thread(target=self._into, args=(future, copy, keep), daemon=True).start()
        self._under_way = future

    def poll(self) -> Path | None:
        """Return the checkpoint that has become visible since the last call, if one has.

        Collective while a save is under way (one number is summed), so that its end, or its error,
        is met by all ranks at the same step. Raises CheckpointError.
        """
        if self._under_way is None or self.world.any_rank(not self._under_way.done()):
            return None
        return self.wait()

    def wait(self) -> Path | None:
        """Wait for the save under way, if there is one, and return its directory.

        Raises what it met: CheckpointError where a disk refused.
        """
        if self._under_way is None:
            return None
        under_way, self._under_way = self._under_way, None
        return under_way.result()

    def close(self) -> None:
        """Wait for the save under way and leave the group. Collective."""
        try:
            self.wait()
        finally:
            close_group(self._group)

    def _write(self, snapshot: RankSnapshot, keep: Keep) -> Path:
        return write_shards(
            self.root, snapshot, world=self.world, group=self._group, keep=keep, disk=self._disk
        )

    def _into(self, future: Future[Path], snapshot: RankSnapshot, keep: Keep) -> None:
        try:
            future.set_result(self._write(snapshot, keep))
        except BaseException as error:
            future.set_exception(error)
