"""Training hooks: what runs before, after and between steps (checkpoints, validation, logging).

Every rank calls every hook in the same order, so a hook may use collectives; one that writes files
or prints does so on rank 0.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from moesaic.checkpoint.checkpoint_directory import CheckpointPaths, RetentionPolicy
from moesaic.checkpoint.full_checkpoint import save_checkpoint
from moesaic.checkpoint.sharded_checkpoint import CheckpointSaver
from moesaic.checkpoint.snapshot import RankSnapshot
from moesaic.distributed.rank0 import run_on_rank0
from moesaic.monitor.metric_writers import MetricWriter
from moesaic.monitor.progress_display import (
    ProgressDisplay,
    RunStatus,
    make_display,
)
from moesaic.train.random_state import preserve_random_state
from moesaic.train.trainer import StepReport, Trainer


class Hook:
    """Base class of hooks; all three methods default to doing nothing."""

    def before_run(self, trainer: Trainer) -> None:
        """Run once before the first (or first resumed) step."""

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Run after every update."""

    def after_run(self, trainer: Trainer) -> None:
        """Run once at the end, also after a signal or NonFiniteError."""


class ValidationHook(Hook):
    """Computes the loss of the same held-out rows every ``validation.every`` steps."""

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        every = trainer.run.validation.every
        if every and (report.step % every == 0 or report.step == trainer.run.steps):
            values = self.validation_losses(trainer)
            trainer.event_log.record_values(values)
            if "valid/loss" in values:
                trainer.event_log.record_validation_loss(values["valid/loss"], step=report.step)

    def validation_losses(self, trainer: Trainer) -> dict[str, float]:
        """Return ``valid/loss``, the head's metrics, and each by category. Collective."""
        metrics = trainer.new_metrics()
        trainer.model.eval()
        with torch.no_grad(), preserve_random_state(trainer.world.device):
            for batch in trainer.held_out_batches(rows=trainer.run.validation.rows):
                metrics.add_losses(trainer.objective.losses(trainer.parallel_model, batch=batch))
        trainer.model.train()
        return metrics.mean_losses(trainer.world, prefix="valid")


SLOW_RATIO = 1.5  # to the median of the other ranks
SLOW_ROWS = 3  # consecutive rows of metrics before a note


class StragglerHook(Hook):
    """Notes a rank that is persistently slower than the others (a straggler).

    A step takes equally long on all ranks, because fast ranks wait for slow ones in collectives; so
    the time in collectives is subtracted. On a GPU this is host time without queued kernels. Costs
    one all-gather of one number per row of metrics.
    """

    def __init__(self, *, slow_ratio: float = SLOW_RATIO, rows: int = SLOW_ROWS) -> None:
        self._slow_ratio, self._rows = slow_ratio, rows
        self._busy_s, self._steps = 0.0, 0
        self._suspect, self._in_a_row = -1, 0

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        self._busy_s += report.seconds - report.collective_seconds
        self._steps += 1
        run = trainer.run
        if trainer.world.size > 1 and run.log.is_due(report.step, steps=run.steps):
            busy = torch.tensor([self._busy_s / self._steps], dtype=torch.float64)
            seconds = [float(part) for part in trainer.world.all_gather(busy)]
            self._busy_s, self._steps = 0.0, 0
            self._compare(trainer, seconds)

    def _compare(self, trainer: Trainer, seconds: list[float]) -> None:
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        others = median(s for rank, s in enumerate(seconds) if rank != slowest)
        ratio = seconds[slowest] / max(others, 1e-9)
        trainer.event_log.record_values(
            {"perf/slowest_rank": float(slowest), "perf/slowest_ratio": ratio}
        )
        is_slow = ratio > self._slow_ratio
        self._in_a_row = (
            self._in_a_row + 1 if is_slow and slowest == self._suspect else int(is_slow)
        )
        self._suspect = slowest
        if self._in_a_row == self._rows:
            trainer.event_log.add_note(
                f"step {trainer.step}: rank {slowest} takes {ratio:.1f} times as long as the "
                f"others ({1e3 * seconds[slowest]:.0f} ms a step, theirs {1e3 * others:.0f} ms), "
                f"for {self._rows} rows of metrics: check its machine"
            )


class CheckpointHook(Hook):
    """Saves checkpoints: every ``checkpoint.every`` steps, at the best loss, and at the end.

    Runs after every hook whose state a checkpoint holds. ``flush`` is called before each save, so
    that metrics on disk are never behind a checkpoint.
    """

    def __init__(self, root: Path, *, flush: Callable[[], None]) -> None:
        self.root = root
        self._flush = flush
        self._saved_step: int | None = None
        self._saver: CheckpointSaver | None = None

    def before_run(self, trainer: Trainer) -> None:
        # A resumed step is on disk. Step 0 needs no checkpoint, except for the export of shards.
        final = CheckpointPaths(self.root, trainer.step, 0).final
        is_saved = trainer.parallel_model.is_replicated or run_on_rank0(trainer.world, final.is_dir)
        self._saved_step = trainer.step if is_saved else None

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
        self._saved_step = trainer.step
        if isinstance(snapshot, RankSnapshot):  # each rank writes its shards in the background
            run_on_rank0(trainer.world, self._flush)
            self._saver = self._saver or CheckpointSaver(self.root, world=trainer.world)
            self._saver.save_async(snapshot, retention=RetentionPolicy(keep, best))
            return

        def write() -> None:
            self._flush()
            save_checkpoint(self.root, snapshot, keep=keep, best=best)

        run_on_rank0(trainer.world, write)


MakeDisplay = Callable[[RunStatus], ProgressDisplay]


def terminal_progress(status: RunStatus) -> ProgressDisplay:
    """Return a live table on a terminal, plain lines elsewhere; on standard error."""
    return make_display(status=status)


def no_progress(status: RunStatus) -> ProgressDisplay:  # noqa: ARG001
    """Return a display that prints nothing (ranks other than 0, ``--quiet``)."""
    return ProgressDisplay()


class MetricsLogHook(Hook):
    """Writes rows of metrics: the trainer's running metrics and the values of other hooks.

    Runs after those hooks. Only rank 0 writes and displays; sums are over all ranks.
    """

    def __init__(self, *, writer: MetricWriter, progress: ProgressDisplay) -> None:
        self._writer, self._progress = writer, progress
        self._steps, self._rolled_back, self._seconds, self._data_seconds = 0, 0, 0.0, 0.0

    def before_run(self, trainer: Trainer) -> None:
        self._show_notes(trainer)
        self._progress.open()

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        self._steps += 1
        self._rolled_back += report.rolled_back
        self._seconds += report.seconds
        self._data_seconds += report.data_seconds
        self._progress.advance(report.step)
        if trainer.run.log.is_due(report.step, steps=trainer.run.steps):
            trainer.event_log.record_values(self._row(trainer, lr=report.lr))
        values = trainer.event_log.pop_values()
        if values:
            self._writer.write(report.step, values=values)
            self._progress.update_metrics(values, health=trainer.event_log.router_health)
        self._show_notes(trainer)

    def after_run(self, trainer: Trainer) -> None:
        self._show_notes(trainer)
        self._writer.flush()

    def flush(self) -> None:
        """Flush all rows to disk."""
        self._writer.flush()

    def close(self) -> None:
        """Close the progress display and the writers."""
        self._progress.close()
        self._writer.close()

    def _row(self, trainer: Trainer, *, lr: float) -> dict[str, float]:
        row = trainer.metrics.compute_and_reset(trainer.world)
        tokens = row.pop("tokens")
        row["train/lr"] = lr
        row["perf/tokens_per_s"] = tokens / max(self._seconds, 1e-9)
        row["perf/step_ms"] = 1e3 * self._seconds / self._steps
        row["time/data_ms"] = 1e3 * self._data_seconds / self._steps
        if trainer.run_ahead.num_bytes:
            row["perf/rolled_back"] = self._rolled_back / self._steps
        self._steps, self._rolled_back, self._seconds, self._data_seconds = 0, 0, 0.0, 0.0
        return row

    def _show_notes(self, trainer: Trainer) -> None:
        for sentence in trainer.event_log.pop_notes():
            self._progress.note(sentence)
