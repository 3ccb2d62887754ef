"""Checkpoint hook: saves at intervals, at the best loss, and at the end."""

from pathlib import Path

import pytest

from moesaic.checkpoint.full_checkpoint import load_checkpoint
from moesaic.core.errors import UserError
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.world import ProcessGroupWorld
from moesaic.testing.tiny_models import tiny_run, tiny_trainer
from moesaic.train.loop import training_loop
from moesaic.train.run import CheckpointConfig
from moesaic.train.trainer import StepReport, Trainer
from moesaic.train.training_hooks import CheckpointHook, Hook


class Score(Hook):
    """Pretends to validate: the best loss comes at step 3."""

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        trainer.event_log.record_validation_loss(abs(report.step - 3.0), step=report.step)


def _names(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("step-*"))


def test_checkpoints_are_saved_at_intervals_and_at_the_end_after_a_flush(tmp_path: Path) -> None:
    flushed: list[int] = []
    trainer = tiny_trainer(tiny_run(checkpoint=CheckpointConfig(every=4, keep=9)))
    hook = CheckpointHook(tmp_path, flush=lambda: flushed.append(trainer.step))
    training_loop(trainer, hooks=[hook], until=10)
    assert _names(tmp_path) == ["step-00000004", "step-00000008", "step-00000010"]
    assert flushed == [4, 8, 10]


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path: Path) -> None:
    trainer = tiny_trainer(tiny_run(checkpoint=CheckpointConfig(every=4, keep=1)))
    training_loop(trainer, hooks=[Score(), CheckpointHook(tmp_path, flush=lambda: None)], until=9)
    assert _names(tmp_path) == ["step-00000003", "step-00000009"]
    assert (tmp_path / "best").read_text().strip() == "step-00000003"
    again = tiny_trainer(tiny_run())
    again.restore(load_checkpoint(tmp_path))
    assert (again.event_log.best.step, again.event_log.best.loss) == (3, 0.0)


def test_an_unchanged_state_is_not_saved_again(tmp_path: Path) -> None:
    trainer = tiny_trainer(tiny_run())
    training_loop(trainer, hooks=[CheckpointHook(tmp_path, flush=lambda: None)], until=0)
    assert not tmp_path.exists() or _names(tmp_path) == []


def _on_a_full_disk(root: Path) -> str:
    def refuse() -> None:
        raise UserError("the disk is full")

    trainer = tiny_trainer(
        tiny_run(checkpoint=CheckpointConfig(every=1)), world=ProcessGroupWorld()
    )
    with pytest.raises(UserError) as caught:
        training_loop(trainer, hooks=[CheckpointHook(root, flush=refuse)], until=3)
    return str(caught.value)


def test_a_full_disk_raises_on_every_rank(tmp_path: Path) -> None:
    assert run_on_ranks(2, _on_a_full_disk, tmp_path) == ["the disk is full"] * 2
