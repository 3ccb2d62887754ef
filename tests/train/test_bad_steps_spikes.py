"""Loss spikes: criterion and consequences, equal on all ranks and after a restart."""

import json
import math
import random

import pytest
import torch

from moesaic.core.errors import CheckpointError
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess, World
from moesaic.testing.tiny_models import tiny_run, tiny_trainer
from moesaic.train.bad_steps import IgnoreSpikes, LossHistory, SkipSpikes, SpikeDecision
from moesaic.train.run import Run
from moesaic.train.trainer import Trainer

RULE = SkipSpikes(window=8, factor=6.0, patience=3, lr_factor=0.5)


def _usual(
    rule: SkipSpikes = RULE, *, losses: tuple[float, ...] = (2.0, 2.1, 1.9, 2.05)
) -> LossHistory:
    past = LossHistory()
    for loss in losses:
        past = rule.decide(loss, history=past).history
    return past


def test_no_step_is_a_spike_before_half_a_window_of_losses() -> None:
    assert RULE.loss_limit((2.0, 2.1, 1.9)) == math.inf
    assert 2.2 < RULE.loss_limit(_usual().recent) < 3.0
    assert not RULE.decide(1e9, history=LossHistory()).skip


def test_a_spike_is_skipped_and_not_added_to_the_history() -> None:
    past = _usual()
    judged = RULE.decide(9.0, history=past)
    assert judged.skip
    assert judged.history == LossHistory(past.recent, in_a_row=1)
    assert "the loss of 9 is a spike (over" in judged.note
    after = RULE.decide(2.0, history=judged.history)
    assert not after.skip
    assert after.history.in_a_row == 0
    assert len(_usual(losses=(2.0,) * 20).recent) == RULE.window


def test_persistent_spikes_lower_the_learning_rate_and_reset_the_history() -> None:
    past = _usual()
    for _ in range(2):
        past = RULE.decide(9.0, history=past).history
    judged = RULE.decide(9.0, history=past)
    assert judged.history == LossHistory(rate=0.5)
    assert "3 in a row: from here on learning rates are 0.5 of their schedule" in judged.note
    assert not RULE.decide(9.0, history=judged.history).skip, (
        "the higher loss is usual from here on"
    )


def test_a_small_change_of_constant_losses_is_no_spike() -> None:
    past = _usual(losses=(2.0,) * 8)
    assert not RULE.decide(2.1, history=past).skip
    assert RULE.decide(2.2, history=past).skip


def test_falling_or_noisy_losses_are_no_spikes() -> None:
    draw, past, rule = random.Random(0), LossHistory(), SkipSpikes()
    for step in range(2000):
        judged = rule.decide(2 + 6 * math.exp(-step / 300) + draw.gauss(0, 0.15), history=past)
        assert not judged.skip, step
        past = judged.history


def test_the_loss_history_round_trips_through_a_checkpoint() -> None:
    past = RULE.decide(9.0, history=_usual()).history
    assert LossHistory.from_dict(json.loads(json.dumps(past.to_dict()))) == past


def test_ignoring_spikes_keeps_no_history() -> None:
    assert IgnoreSpikes().decide(9.0, history=LossHistory()) == SpikeDecision(LossHistory())
    assert not IgnoreSpikes().needs_loss


def _run() -> Run:
    return tiny_run(spikes=SkipSpikes(window=8, factor=6.0, patience=3), max_bad_steps=9)


def _shaken(world: World) -> Trainer:
    """A trainer after five steps; in the sixth, the head's weights are far off for one pass."""
    trainer = tiny_trainer(_run(), world=world)
    for _ in range(5):
        trainer.train_step()
    inner, shaken = trainer.objective, []

    class Shaken:
        categories = inner.categories

        def forward_backward(self, parallel_model, *, batches):
            seen = inner.forward_backward(parallel_model, batches=batches)
            if not shaken:
                shaken.append(batches)
                seen.sums.losses[0] *= 20.0
            return seen

    trainer.objective = Shaken()  # pyright: ignore[reportAttributeAccessIssue]
    return trainer


def _spike(world: World) -> tuple[list[str], int, float]:
    trainer = _shaken(world)
    before = trainer.data.state()
    trainer.train_step()
    notes = trainer.event_log.pop_notes()
    assert trainer.retry_queue.pending == [before], "its batch must come again"
    trainer.train_step()
    assert trainer.retry_queue.pending == []
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return notes, trainer.step, float(weights.double().sum())


def test_a_spike_is_skipped_in_training_and_its_batch_is_retried() -> None:
    notes, step, _ = _spike(SingleProcess())
    (note,) = notes
    assert note.startswith("step 6 skipped: the loss of")
    assert note.endswith("its batch is queued for one retry")
    assert step == 7


def test_all_ranks_skip_the_same_spike() -> None:
    first, second = run_on_ranks(2, lambda: _spike(ProcessGroupWorld()))
    assert first == second
    assert first[:2] == _spike(SingleProcess())[:2]


def test_the_lowered_learning_rate_survives_a_restart() -> None:
    trainer = tiny_trainer(_run())
    trainer.loss_history = LossHistory(recent=(2.0, 2.1), rate=0.25)
    first = trainer.train_step().lr
    other = tiny_trainer(_run())
    other.restore(trainer.snapshot())
    assert other.loss_history == trainer.loss_history
    usual = tiny_trainer(tiny_run())
    assert first == pytest.approx(0.25 * usual.train_step().lr)


@pytest.mark.parametrize(
    "value",
    [{"rate": -1}, {"rate": 2**62}, {"rate": None}, {"rate": math.nan}, {"in_a_row": 1.5},
     {"recent": {}}, {"recent": ["x"]}],
)  # fmt: skip
def test_a_saved_history_out_of_range_is_refused(value):
    """A rate of -1 turned every learning rate around, without a word."""
    with pytest.raises(CheckpointError, match="the saved losses"):
        LossHistory.from_dict(LossHistory().to_dict() | value)
