"""A slow rank is found by the time it works, not by the time its steps take."""

import time

import pytest

from moesaic.dist.world import Alone, Ranks, World
from moesaic.testing.ranks import run_on_ranks
from moesaic.testing.tiny import tiny_run, tiny_trainer
from moesaic.train.hooks.hook import Hook
from moesaic.train.hooks.stragglers import WatchStragglers
from moesaic.train.loop import loop
from moesaic.train.run import Log
from moesaic.train.trainer import StepReport, Trainer


class Keep(Hook):
    """Keeps what the journal has, step by step."""

    def __init__(self) -> None:
        self.values: dict[int, dict[str, float]] = {}
        self.notes: list[str] = []

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        self.values[report.step] = trainer.journal.take_values()
        self.notes += trainer.journal.take_notes()


def _train(world: World, slow: int) -> Keep:
    run = tiny_run(steps=6, log=Log(every=1))
    trainer, keep = tiny_trainer(run, world=world), Keep()
    if world.rank == slow:
        trainer.model.register_forward_pre_hook(lambda *_: time.sleep(0.2))
    loop(trainer, hooks=[WatchStragglers(slow=3.0, rows=2), keep], until=6)
    return keep


@pytest.mark.slow
def test_the_slowest_rank_is_named_in_the_rows_and_once_in_words() -> None:
    for keep in run_on_ranks(3, lambda: _train(Ranks(), slow=1)):
        for values in keep.values.values():
            assert values["perf/slowest_rank"] == 1.0
            assert values["perf/slowest_ratio"] > 3.0
        (note,) = keep.notes
        assert note.startswith("step 2: rank 1 works")
        assert "for 2 rows of metrics now" in note


def test_one_rank_alone_is_not_compared() -> None:
    keep = _train(Alone(), slow=-1)
    assert not any(keep.values.values())
