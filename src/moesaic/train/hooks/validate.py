"""Validate: loss on held-out text, per task and language, and which step was best."""

from collections.abc import Callable, Iterable

import torch

from moesaic.data.batch import Batch
from moesaic.train.hooks.hook import Hook
from moesaic.train.meters import Meters
from moesaic.train.randomness import undisturbed
from moesaic.train.trainer import StepReport, Trainer


class Validate(Hook):
    """``batches`` gives this rank's share of the same held-out batches each time it is called."""

    def __init__(self, batches: Callable[[], Iterable[Batch]]) -> None:
        self._batches = batches

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
            for batch in self._batches():
                meters.add_losses(trainer.objective.losses(trainer.model, batch=batch))
        trainer.model.train()
        return meters.mean_losses(trainer.world, prefix="valid")
