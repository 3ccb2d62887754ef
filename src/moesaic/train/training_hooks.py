"""What happens around the steps: each hook has ``before_run``, ``after_step``, ``after_run``.

Hook: what may happen around the steps of a run. Three methods, all empty here.

Every rank runs every hook in the same order, so a hook may use collectives; one that writes files
or talks to people does so on rank 0.

Validate: loss on held-out text, per task and language, and which step was best.

StragglerHook: which rank the others wait for, while all of them still work.

CheckpointHook: the run's state on disk every so often, at its best, and at its end.

Boards for a call of ``train``: what a person sees, or nothing.

Log: a row of metrics every so often, to files and to the person who watches.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch

from moesaic.checkpoint.checkpoint_directory import RetentionPolicy
from moesaic.checkpoint.full_checkpoint import save_checkpoint
from moesaic.checkpoint.sharded_checkpoint import CheckpointSaver
from moesaic.checkpoint.snapshot import RankSnapshot
from moesaic.distributed.rank0 import run_on_rank0
from moesaic.monitor.metric_writers import MetricWriter
from moesaic.monitor.progress_display import ProgressDisplay, RunStatus, make_display
from moesaic.train.random_state import preserve_random_state
from moesaic.train.running_metrics import RunningMetrics
from moesaic.train.trainer import StepReport, Trainer


class Hook:
    """Base of all hooks; override what you need."""

    def before_run(self, trainer: Trainer) -> None:
        """Called once, with the trainer at its first (or resumed) step."""

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Called after every update."""

    def after_run(self, trainer: Trainer) -> None:
        """Called once at the end, also after a signal or after too many bad steps."""


class ValidationHook(Hook):
    """Scores the same held-out rows each time, in evaluation mode."""

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        every = trainer.run.validation.every
        if every and (report.step % every == 0 or report.step == trainer.run.steps):
            values = self.validation_losses(trainer)
            trainer.event_log.record_values(values)
            if "valid/loss" in values:
                trainer.event_log.record_validation_loss(values["valid/loss"], step=report.step)

    def validation_losses(self, trainer: Trainer) -> dict[str, float]:
        """Return ``valid/loss`` and its parts, nats per predicted token. Collective."""
        meters = RunningMetrics(trainer.objective.categories, device=trainer.world.device)
        trainer.model.eval()
        with torch.no_grad(), preserve_random_state(trainer.world.device):
            for batch in trainer.data.held_out_batches("valid", rows=trainer.run.validation.rows):
                meters.add_losses(trainer.objective.losses(trainer.parallel_model, batch=batch))
        trainer.model.train()
        return meters.mean_losses(trainer.world, prefix="valid")


SLOW_RATIO = 1.5  # times the median rank


SLOW_ROWS = 3  # rows of metrics in a row, before it is said


class StragglerHook(Hook):
    """Compares, at every row of metrics, the time that each rank worked itself.

    A step takes all ranks equally long, for the quick ones wait in collectives for the slow one;
    so the time in collectives is taken off. On a GPU it is the host's time: a kernel that is queued
    and not waited for is nobody's. One gather of one number a rank.
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
            mine = torch.tensor([self._busy_s / self._steps], dtype=torch.float64)
            seconds = [float(part) for part in trainer.world.all_gather(mine)]
            self._busy_s, self._steps = 0.0, 0
            self._compare(trainer, seconds)

    def _compare(self, trainer: Trainer, seconds: list[float]) -> None:
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        others = median(s for rank, s in enumerate(seconds) if rank != slowest)
        ratio = seconds[slowest] / max(others, 1e-9)
        trainer.event_log.record_values(
            {"perf/slowest_rank": float(slowest), "perf/slowest_ratio": ratio}
        )
        again = slowest == self._suspect and ratio > self._slow_ratio
        self._in_a_row = self._in_a_row + 1 if again else int(ratio > self._slow_ratio)
        self._suspect = slowest
        if self._in_a_row == self._rows:
            trainer.event_log.add_note(
                f"step {trainer.step}: rank {slowest} works {ratio:.1f} times as long as the "
                f"others ({1e3 * seconds[slowest]:.0f} ms a step, theirs {1e3 * others:.0f} ms), "
                f"for {self._rows} rows of metrics now: look at its machine"
            )


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

    def _save_sharded(
        self, trainer: Trainer, snapshot: RankSnapshot, *, keep: RetentionPolicy
    ) -> None:
        """Write what each rank holds: in the background, but for a run that ends."""
        run_on_rank0(trainer.world, self._flush)
        if self._saver is None:
            self._saver = CheckpointSaver(self.root, world=trainer.world)
        self._saver.save_async(snapshot, retention=keep)
        self._saved_step = trainer.step


MakeDisplay = Callable[[RunStatus], ProgressDisplay]


def terminal_progress(status: RunStatus) -> ProgressDisplay:
    """A live table on a terminal, plain lines elsewhere; on standard error."""
    return make_display(status=status)


def no_progress(status: RunStatus) -> ProgressDisplay:  # noqa: ARG001
    """Nothing at all: other ranks, tests, and callers with a board of their own."""
    return NullDisplay()


class NullDisplay:
    """The null object of boards."""

    def open(self) -> None: ...

    def advance(self, step: int) -> None: ...

    def update_metrics(self, values: Mapping[str, float], *, health: str = "") -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class MetricsLogHook(Hook):
    """Writes the trainer's meters and what other hooks put into the journal.

    Comes after those hooks. Only rank 0 has sinks and a board; the sums are of all ranks.
    """

    def __init__(self, *, sink: MetricWriter, progress: ProgressDisplay) -> None:
        self._sink, self._progress = sink, progress
        self._steps, self._seconds, self._data_seconds = 0, 0.0, 0.0

    def before_run(self, trainer: Trainer) -> None:
        self._show_notes(trainer)
        self._progress.open()

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        self._steps += 1
        self._seconds += report.seconds
        self._data_seconds += report.data_seconds
        self._progress.advance(report.step)
        if trainer.run.log.is_due(report.step, steps=trainer.run.steps):
            trainer.event_log.record_values(self._row(trainer, lr=report.lr))
        values = trainer.event_log.pop_values()
        if values:
            self._sink.write(report.step, values=values)
            self._progress.update_metrics(values, health=trainer.event_log.router_health)
        self._show_notes(trainer)

    def after_run(self, trainer: Trainer) -> None:
        self._show_notes(trainer)
        self._sink.flush()

    def flush(self) -> None:
        """Return when every row is on the medium."""
        self._sink.flush()

    def close(self) -> None:
        """Take the board down and close the files."""
        self._progress.close()
        self._sink.close()

    def _row(self, trainer: Trainer, *, lr: float) -> dict[str, float]:
        row = trainer.metrics.compute_and_reset(trainer.world)
        tokens = row.pop("tokens")
        row["train/lr"] = lr
        row["perf/tokens_per_s"] = tokens / max(self._seconds, 1e-9)
        row["perf/step_ms"] = 1e3 * self._seconds / self._steps
        row["time/data_ms"] = 1e3 * self._data_seconds / self._steps
        self._steps, self._seconds, self._data_seconds = 0, 0.0, 0.0
        return row

    def _show_notes(self, trainer: Trainer) -> None:
        for sentence in trainer.event_log.pop_notes():
            self._progress.note(sentence)
