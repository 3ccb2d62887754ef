"""SaveCheckpoints: the run's state on disk every so often, at its best, and at its end."""

from collections.abc import Callable
from pathlib import Path

from moesaic.checkpoint.publish import RetentionPolicy
from moesaic.checkpoint.save import save_checkpoint
from moesaic.checkpoint.saver import CheckpointSaver
from moesaic.checkpoint.snapshot import RankSnapshot
from moesaic.dist.first import run_on_rank0
from moesaic.train.hooks.hook import Hook
from moesaic.train.trainer import StepReport, Trainer


class CheckpointHook(Hook):
    """Comes after every hook whose state or rows a checkpoint should hold.

    ``flush`` is called before each save, so that metrics on disk are never behind a checkpoint.
    """

    def __init__(self, root: Path, *, flush: Callable[[], None]) -> None:
        self.root = root
        self._flush = flush
        self._saved_step: int | None = None
        self._saver: CheckpointSaver | None = None

    def before_run(self, trainer: Trainer) -> None:
        self._saved_step = trainer.step  # what it was resumed from; a fresh start can be made again

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        if self._saver is not None:
            self._saver.poll()
        every = trainer.run.checkpoint.every
        best = trainer.event_log.best.step == report.step
        if best or (every and report.step % every == 0):
            self._save(trainer, best=best)

    def after_run(self, trainer: Trainer) -> None:
        if self._saved_step != trainer.step or trainer.retry_queue.consecutive_failures:
            self._save(trainer, best=trainer.event_log.best.step == trainer.step)
        if self._saver is not None:
            self._saver.close()
            self._saver = None

    def _save(self, trainer: Trainer, *, best: bool) -> None:
        snapshot = trainer.snapshot()
        keep = trainer.run.checkpoint.keep
        if isinstance(snapshot, RankSnapshot):
            self._save_sharded(trainer, snapshot, keep=RetentionPolicy(keep, best))
            return

        def write() -> None:
            self._flush()
            save_checkpoint(self.root, snapshot, keep=keep, best=best)

        run_on_rank0(trainer.world, write)
        self._saved_step = trainer.step

    def _save_sharded(self, trainer: Trainer, snapshot: RankSnapshot, *, keep: RetentionPolicy) -> None:
        """Write what each rank holds: in the background, but for a run that ends."""
        run_on_rank0(trainer.world, self._flush)
        if self._saver is None:
            self._saver = CheckpointSaver(self.root, world=trainer.world)
        self._saver.save_async(snapshot, retention=keep)
        self._saved_step = trainer.step
