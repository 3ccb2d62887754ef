"""Log: a row of metrics every so often, to files and to the person who watches."""

from moesaic.observe.console import ProgressDisplay
from moesaic.observe.metrics import MetricWriter
from moesaic.train.hooks.hook import Hook
from moesaic.train.trainer import StepReport, Trainer


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
