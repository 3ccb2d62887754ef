"""Trainer: non-finite steps and the contents of a snapshot."""

import math
from collections.abc import Sequence

import pytest
import torch

from moesaic.core.errors import CheckpointError
from moesaic.data.batch import Batch
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.world import ProcessGroupWorld
from moesaic.model import transformer
from moesaic.parallel.parallel_model import ParallelModel
from moesaic.testing.tiny_models import TinyStream, tiny_run, tiny_trainer
from moesaic.train.step import ForwardBackwardResult, Objective
from moesaic.train.trainer import NonFiniteError, Trainer


class Poisoned:
    """An objective whose n-th call (from 1) leaves a NaN in one gradient."""

    def __init__(self, inner: Objective, *, bad: set[int]) -> None:
        self.inner, self.bad, self.calls = inner, bad, 0
        self.categories = inner.categories
        self.batches: list[Batch] = []

    def forward_backward(
        self, parallel_model: ParallelModel, *, batches: Sequence[Batch]
    ) -> ForwardBackwardResult:
        self.calls += 1
        self.batches.append(batches[0])
        result = self.inner.forward_backward(parallel_model, batches=batches)
        if self.calls in self.bad:
            grad = parallel_model.model.decoder_norm.weight.grad
            assert grad is not None
            grad[3] = math.nan
        return result


def _poisoned(bad: set[int], **changes: object) -> tuple[Trainer, Poisoned]:
    trainer = tiny_trainer(tiny_run(**changes))
    poison = Poisoned(trainer.objective, bad=bad)
    trainer.objective = poison  # pyright: ignore[reportAttributeAccessIssue]
    return trainer, poison


def test_a_non_finite_step_changes_nothing_and_its_batch_is_retried() -> None:
    trainer, poison = _poisoned({2})
    trainer.train_step()
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.optimizer.zero_grad()
    changed: list[bool] = []
    inner_step = poison.forward_backward

    def watching(
        parallel_model: ParallelModel, *, batches: Sequence[Batch]
    ) -> ForwardBackwardResult:
        named = parallel_model.model.named_parameters()
        changed.append(any(not torch.equal(p, before[n]) for n, p in named))
        return inner_step(parallel_model, batches=batches)

    poison.forward_backward = watching  # pyright: ignore[reportAttributeAccessIssue]
    report = trainer.train_step()
    assert report.step == 2
    assert changed == [False, False], "the bad step must leave the weights alone"
    trainer.train_step()
    bad, new, again = poison.batches[1:4]
    assert torch.equal(bad.source.values, again.source.values)
    assert not torch.equal(bad.source.values[:2, :2], new.source.values[:2, :2])
    trainer.train_step()
    assert trainer.data.state() == {"drawn": 4}, "a retry must not move the place in the data"
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


def test_the_note_names_the_first_non_finite_gradient() -> None:
    trainer, _ = _poisoned({1})
    trainer.train_step()
    (note,) = trainer.event_log.pop_notes()
    assert note.startswith("step 1 skipped: the gradient of decoder_norm.weight")
    assert "one retry" in note
    assert trainer.metrics.compute_and_reset(trainer.world)["train/skipped"] == 1


def test_a_batch_that_fails_twice_is_dropped() -> None:
    trainer, poison = _poisoned({1, 3})  # 1 fails, 2 is good, 3 is the retry of 1
    for _ in range(4):
        trainer.train_step()
    assert "given up" in trainer.event_log.pop_notes()[1]
    assert trainer.retry_queue.pending == []
    assert torch.equal(poison.batches[0].source.values, poison.batches[2].source.values)


def test_too_many_bad_steps_in_a_row_end_the_run() -> None:
    trainer, poison = _poisoned({2, 3, 4}, max_bad_steps=3)
    trainer.train_step()
    with pytest.raises(NonFiniteError, match=r"3 steps in a row .* after step 1 .*decoder_norm"):
        trainer.train_step()
    assert (trainer.step, poison.calls) == (1, 4)
    assert len(trainer.snapshot().state["retry"]) == 3


def test_a_non_finite_loss_is_named_with_its_language() -> None:
    trainer = tiny_trainer(tiny_run(max_bad_steps=1))
    with torch.no_grad():
        trainer.model.embedding.weight[7] = math.inf
    with pytest.raises(NonFiniteError, match=r"the loss of translation, .*ell_Grek.* gradient of"):
        trainer.train_step()


def _bad_on_one_rank() -> tuple[list[str], float]:
    world = ProcessGroupWorld()
    trainer = tiny_trainer(tiny_run(), world=world)
    if world.rank == 1:
        weight = trainer.model.decoder_norm.weight
        weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(NonFiniteError):
        trainer.train_step()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return trainer.event_log.pop_notes(), float(weights.double().sum())


def test_all_ranks_skip_the_same_step() -> None:
    first, second = run_on_ranks(2, _bad_on_one_rank)
    assert first == second
    assert len(first[0]) == 5


def test_weights_of_another_shape_are_named() -> None:
    trainer = tiny_trainer(tiny_run())
    snapshot = trainer.snapshot()
    weights = dict(snapshot.files["model"])
    weights["decoder_norm.weight"] = torch.ones(3)
    del weights["encoder_norm.weight"]
    files = dict(snapshot.files) | {"model": weights}
    wrong = type(snapshot)(snapshot.step, files, snapshot.state)
    with pytest.raises(CheckpointError, match=r"encoder_norm.weight is missing.*has shape \[3\]"):
        trainer.restore(wrong)


def test_a_tiny_model_learns() -> None:
    trainer = tiny_trainer(tiny_run(steps=200))
    trainer.data = TinyStream(rows=4)
    losses = []
    for _ in range(40):
        trainer.data.restore({"drawn": 0})  # the same batch each time
        trainer.train_step()
        losses.append(trainer.metrics.compute_and_reset(trainer.world)["train/loss"])
    assert losses[-1] < 0.6 * losses[0]


def test_a_trainer_allocates_no_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a whole model was made")

    monkeypatch.setattr(transformer, "allocate_whole", refuse)
    tiny_trainer(tiny_run())
