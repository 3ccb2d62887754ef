"""Validate: loss on held-out text, per task and language, and which step was best."""

import torch

from moesaic.train.hooks.hook import Hook
from moesaic.train.meters import RunningMetrics
from moesaic.train.randomness import preserve_random_state
from moesaic.train.trainer import StepReport, Trainer


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
