"""The training loop, on one screen: advance, then tell the hooks, until done or asked to stop."""

from collections.abc import Sequence

from moesaic.dist.flight import mark_phase
from moesaic.train.hooks.hook import Hook
from moesaic.train.result import StopReason
from moesaic.train.stop import StopRequest
from moesaic.train.trainer import NonFiniteError, Trainer


def training_loop(trainer: Trainer, *, hooks: Sequence[Hook], until: int) -> StopReason:
    """Train up to step ``until``. Ctrl-C and SIGTERM end it after the step they arrive in.

    Raises NotFiniteError after the hooks have ended the run (and saved it).
    """
    with StopRequest() as stop:
        for hook in hooks:
            mark_phase(f"{type(hook).__name__} before the run")
            hook.before_run(trainer)
        try:
            while trainer.step < until and not _stop_requested(trainer, stop):
                report = trainer.train_step()
                for hook in hooks:
                    mark_phase(type(hook).__name__)
                    hook.after_step(trainer, report)
        except NonFiniteError:
            _run_after_run_hooks(trainer, hooks)
            raise
        _run_after_run_hooks(trainer, hooks)
    if trainer.step >= trainer.run.steps:
        return "finished"
    return "until" if trainer.step >= until else stop.stop_reason


def _stop_requested(trainer: Trainer, stop: StopRequest) -> bool:
    mark_phase("between steps")
    return trainer.world.any_rank(stop.requested)


def _run_after_run_hooks(trainer: Trainer, hooks: Sequence[Hook]) -> None:
    for hook in hooks:
        mark_phase(type(hook).__name__)
        hook.after_run(trainer)
