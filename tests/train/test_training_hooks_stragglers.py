"""Straggler hook: a slow rank is found by its time outside collectives."""

from typing import Any

from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess, World
from moesaic.testing.tiny_models import tiny_run, tiny_trainer
from moesaic.train.run import LogConfig
from moesaic.train.trainer import StepReport
from moesaic.train.training_hooks import StragglerHook

NOTHING: Any = None


def _watch(world: World, *, waited: list[float]) -> tuple[list[dict[str, float]], list[str]]:
    """Every step takes each rank a second, of which it waits ``waited`` for the others."""
    trainer = tiny_trainer(tiny_run(steps=6, log=LogConfig(every=1)), world=world)
    hook, rows, notes = StragglerHook(slow_ratio=3.0, rows=2), [], []
    for step in range(1, 7):
        trainer.step = step
        hook.after_step(trainer, StepReport(step, NOTHING, 0.1, 1.0, 0.0, waited[world.rank]))
        rows.append(trainer.event_log.pop_values())
        notes += trainer.event_log.pop_notes()
    return rows, notes


def test_the_slowest_rank_is_in_every_row_and_noted_once() -> None:
    for rows, notes in run_on_ranks(3, lambda: _watch(ProcessGroupWorld(), waited=[0.9, 0.0, 0.8])):
        for row in rows:
            assert row["perf/slowest_rank"] == 1.0
            assert round(row["perf/slowest_ratio"], 2) == round(1.0 / 0.15, 2)
        (note,) = notes
        assert note.startswith("step 2: rank 1 takes 6.7 times as long as the others")
        assert "(1000 ms a step, theirs 150 ms), for 2 rows of metrics" in note


def test_a_slightly_slower_rank_is_not_noted() -> None:
    for _, notes in run_on_ranks(2, lambda: _watch(ProcessGroupWorld(), waited=[0.2, 0.0])):
        assert notes == []


def test_a_single_rank_is_not_compared() -> None:
    rows, notes = _watch(SingleProcess(), waited=[0.0])
    assert not any(rows)
    assert notes == []


def _waited() -> tuple[float, float]:
    report = tiny_trainer(tiny_run(), world=ProcessGroupWorld()).train_step()
    return report.collective_seconds, report.seconds


def test_a_step_reports_its_time_in_collectives() -> None:
    for waited, whole in run_on_ranks(2, _waited):
        assert 0.0 < waited < whole
