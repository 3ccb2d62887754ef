"""Validate: loss on held-out text, per task and language, and which step was best."""

import torch

from moesaic.train.hooks.hook import Hook
from moesaic.train.meters import Meters
from moesaic.train.randomness import undisturbed
from moesaic.train.trainer import StepReport, Trainer


class Validate(Hook):
    """Scores the same held-out rows each time, in evaluation mode."""

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        every = trainer.run.validation.every
        if every and (report.step % every == 0 or report.step == trainer.run.steps):
            values = self.scores(trainer)
            trainer.journal.put(values)
            if "valid/loss" in values:
                trainer.journal.scored(values["valid/loss"], step=report.step)

    def scores(self, trainer: Trainer) -> dict[str, float]:
        """Return ``valid/loss`` and its parts, nats per predicted token. Collective."""
        meters = Meters(trainer.objective.categories, device=trainer.world.device)
        trainer.model.eval()
        with torch.no_grad(), undisturbed(trainer.world.device):
            for batch in trainer.data.valid_batches("valid", rows=trainer.run.validation.rows):
                meters.add_losses(trainer.objective.losses(trainer.spread, batch=batch))
        trainer.model.train()
        return meters.mean_losses(trainer.world, prefix="valid")
