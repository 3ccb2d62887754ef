"""Training loop: run training steps and hooks until the last step or a stop request."""

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Literal, Self

import torch

from moesaic.distributed.flight_recorder import mark_phase
from moesaic.memory.disk_store import DiskFullError
from moesaic.train.trainer import NonFiniteError, Trainer
from moesaic.train.training_hooks import Hook

StopReason = Literal["finished", "until", "SIGINT", "SIGTERM"]


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """Result of a call of ``train``: steps and tokens since step 0, seconds of this call.

    ``metrics`` holds the latest value of every metric. ``stop_reason``: all steps are done, the
    step ``until`` is reached, or a signal arrived (the run can be resumed).
    """

    out: Path
    steps: int
    tokens: int
    seconds: float
    metrics: dict[str, float]
    stop_reason: StopReason

    @property
    def exit_code(self) -> int:
        """0, or 128 + the number of the signal, as shells report it."""
        ended = self.stop_reason in ("finished", "until")
        return 0 if ended else 128 + signal.Signals[self.stop_reason].value


SIGNALS = (signal.SIGINT, signal.SIGTERM)
REPEAT_S = 1.0


class StopRequest:
    """Context that turns the first Ctrl-C or SIGTERM into a flag; a later one acts as usual.

    A signal within ``REPEAT_S`` of the last is a duplicate: a terminal or Slurm signals both
    torchrun and its workers, and torchrun forwards it to them. Outside the main thread Python
    cannot catch signals, so none is handled.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._received_s = 0.0
        self._previous_handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        try:
            self._previous_handlers = {
                number: signal.signal(number, self._on_signal) for number in SIGNALS
            }
        except ValueError:  # not the main thread
            self._previous_handlers = {}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore_handlers()

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @property
    def stop_reason(self) -> StopReason:
        """The signal that arrived; SIGINT on a rank that received none."""
        return "SIGTERM" if self.signal == signal.SIGTERM else "SIGINT"

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.signal is None:
            self.signal, self._received_s = signal.Signals(number), time.monotonic()
            return
        previous, self._received_s = self._received_s, time.monotonic()
        if self._received_s - previous > REPEAT_S:
            self._restore_handlers()
            signal.raise_signal(number)

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._previous_handlers = {}


def training_loop(trainer: Trainer, *, hooks: Sequence[Hook], until: int) -> StopReason:
    """Train up to step ``until``; Ctrl-C and SIGTERM stop after the current step.

    Several ranks stop one step later: their requests are summed before a step and read after it,
    so that the host waits for no device in between. Raises NonFiniteError and DiskFullError after
    the hooks have finished (and saved a checkpoint).
    """
    with StopRequest() as stop:
        for hook in hooks:
            mark_phase(f"{type(hook).__name__} before the run")
            hook.before_run(trainer)
        mark_phase("between steps")
        stopping, world = trainer.world.any_rank(stop.requested), trainer.world
        try:
            while trainer.step < until and not stopping:
                requests = torch.full((), int(stop.requested), device=world.device)
                requests = world.all_reduce(requests)
                report = trainer.train_step()
                for hook in hooks:
                    mark_phase(type(hook).__name__)
                    hook.after_step(trainer, report)
                mark_phase("between steps")
                stopping = bool(requests) or (world.size == 1 and stop.requested)
        except (NonFiniteError, DiskFullError):
            _run_after_run_hooks(trainer, hooks)
            raise
        _run_after_run_hooks(trainer, hooks)
    if trainer.step >= trainer.run.steps:
        return "finished"
    return "until" if trainer.step >= until else stop.stop_reason


def _run_after_run_hooks(trainer: Trainer, hooks: Sequence[Hook]) -> None:
    for hook in hooks:
        mark_phase(type(hook).__name__)
        hook.after_run(trainer)
