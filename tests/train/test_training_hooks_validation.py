"""Validation hook: deterministic, and without effect on training."""

import torch

from moesaic.moe.auxiliary_losses import SwitchBalance
from moesaic.moe.config import MoE
from moesaic.moe.expert_capacity import Capacity, RandomPriority
from moesaic.testing.tiny_models import tiny_model_config, tiny_run, tiny_trainer
from moesaic.train.loop import training_loop
from moesaic.train.run import ValidationConfig
from moesaic.train.trainer import Trainer
from moesaic.train.training_hooks import ValidationHook

MOE = MoE(
    experts=4, limit=Capacity(factor=1.0, priority=RandomPriority()), balance=(SwitchBalance(),)
)


def _trainer(every: int) -> Trainer:
    model = tiny_model_config(moe=MOE).replace(dropout=0.1)
    return tiny_trainer(tiny_run(model=model, validation=ValidationConfig(every=every)))


def test_validation_losses_are_unsmoothed_and_in_evaluation_mode() -> None:
    trainer = _trainer(1)
    first, second = (
        ValidationHook().validation_losses(trainer),
        ValidationHook().validation_losses(trainer),
    )
    assert first == second, "dropout must be off"
    assert trainer.model.training
    batch = next(trainer.data.held_out_batches("valid", rows=None))
    trainer.model.eval()
    with torch.no_grad():
        nll = trainer.model.loss(trainer.model(batch)).each
    assert abs(first["valid/loss"] - float(nll.mean())) < 1e-5
    assert {"valid/loss/translation", "valid/loss/deu_Latn"} <= first.keys()


def test_validation_does_not_change_training() -> None:
    weights = []
    for every in (0, 2):
        trainer = _trainer(every)
        training_loop(trainer, hooks=[ValidationHook()], until=6)
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.equal(*weights)


def test_the_best_step_is_remembered() -> None:
    trainer = _trainer(2)
    training_loop(trainer, hooks=[ValidationHook()], until=6)
    assert trainer.event_log.best.step in (2, 4, 6)
    assert trainer.event_log.best.loss <= trainer.event_log.latest_values["valid/loss"]
