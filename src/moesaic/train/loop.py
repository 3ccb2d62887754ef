"""The training loop, on one screen: advance, then tell the hooks, until done or asked to stop."""

from collections.abc import Sequence

from moesaic.dist.flight import mark_phase
from moesaic.train.hooks.hook import Hook
from moesaic.train.result import Ending
from moesaic.train.stop import StopRequest
from moesaic.train.trainer import NotFiniteError, Trainer


def loop(trainer: Trainer, *, hooks: Sequence[Hook], until: int) -> Ending:
    """Train up to step ``until``. Ctrl-C and SIGTERM end it after the step they arrive in.

    Raises NotFiniteError after the hooks have ended the run (and saved it).
    """
    with StopRequest() as stop:
        for hook in hooks:
            mark_phase(f"{type(hook).__name__} before the run")
            hook.before_run(trainer)
        try:
            while trainer.step < until and not _asked(trainer, stop):
                report = trainer.advance()
                for hook in hooks:
                    mark_phase(type(hook).__name__)
                    hook.after_step(trainer, report)
        except NotFiniteError:
            _end(trainer, hooks)
            raise
        _end(trainer, hooks)
    if trainer.step >= trainer.run.steps:
        return "finished"
    return "until" if trainer.step >= until else stop.ending


def _asked(trainer: Trainer, stop: StopRequest) -> bool:
    mark_phase("between steps")
    return trainer.world.any_rank(stop.asked)


def _end(trainer: Trainer, hooks: Sequence[Hook]) -> None:
    for hook in hooks:
        mark_phase(type(hook).__name__)
        hook.after_run(trainer)
