"""Hook: what may happen around the steps of a run. Three methods, all empty here.

Every rank runs every hook in the same order, so a hook may use collectives; one that writes files
or talks to people does so on rank 0.
"""

from moesaic.train.trainer import StepReport, Trainer


class Hook:
    """Base of all hooks; override what you need."""

    def before_run(self, trainer: Trainer) -> None:
        """Called once, with the trainer at its first (or resumed) step."""

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Called after every update."""

    def after_run(self, trainer: Trainer) -> None:
        """Called once at the end, also after a signal or after too many bad steps."""
