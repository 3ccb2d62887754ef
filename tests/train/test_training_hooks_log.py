"""Metrics log hook: rows of metrics, notes and progress."""

from collections.abc import Mapping

import pytest

from moesaic.monitor.progress_display import ProgressDisplay
from moesaic.testing.tiny_models import tiny_run, tiny_trainer
from moesaic.train.loop import training_loop
from moesaic.train.trainer import StepReport, Trainer
from moesaic.train.training_hooks import Hook, MetricsLogHook


class Rows:
    """A sink that keeps its rows."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def write(self, step: int, *, values: Mapping[str, float]) -> None:
        self.rows.append((step, dict(values)))

    def flush(self) -> None: ...

    def close(self) -> None: ...


class RecordingDisplay(ProgressDisplay):
    """A progress display that records steps and notes."""

    def __init__(self) -> None:
        self.ticks: list[int] = []
        self.notes: list[str] = []

    def advance(self, step: int) -> None:
        self.ticks.append(step)

    def note(self, text: str) -> None:
        self.notes.append(text)


class Extra(Hook):
    """Puts a value into the rows of two steps, one of them between the others."""

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        if report.step in (3, 4):
            trainer.event_log.record_values({"mine": report.step * 10.0})
            trainer.event_log.add_note(f"seen {report.step}")


@pytest.fixture
def logged() -> tuple[Rows, RecordingDisplay]:
    sink, board = Rows(), RecordingDisplay()
    trainer = tiny_trainer(tiny_run(steps=10))  # a row every 4 steps
    training_loop(trainer, hooks=[Extra(), MetricsLogHook(writer=sink, progress=board)], until=10)
    return sink, board


def test_rows_are_written_at_intervals_at_the_end_and_for_hook_values(
    logged: tuple[Rows, RecordingDisplay],
) -> None:
    rows = dict(logged[0].rows)
    assert list(rows) == [3, 4, 8, 10]
    assert rows[3] == {"mine": 30.0}
    assert rows[4]["mine"] == 40.0
    assert {"train/loss", "train/lr", "perf/step_ms", "time/data_ms"} <= rows[4].keys()
    assert "mine" not in rows[8]
    assert rows[8]["train/tokens"] > rows[4]["train/tokens"]


def test_the_progress_display_gets_every_step_and_every_note_once(
    logged: tuple[Rows, RecordingDisplay],
) -> None:
    assert logged[1].ticks == list(range(1, 11))
    assert logged[1].notes == ["seen 3", "seen 4"]
