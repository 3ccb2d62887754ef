"""StopRequest: Ctrl-C and SIGTERM, turned into a wish that the loop reads between two steps."""

import signal
import time
from types import FrameType, TracebackType
from typing import Self

from moesaic.train.result import StopReason

SIGNALS = (signal.SIGINT, signal.SIGTERM)
REPEAT_S = 1.0


class StopRequest:
    """While entered, the first signal is noted and a later one acts as if we were not here.

    One within ``REPEAT_S`` is the first come again: a terminal or Slurm signals torchrun and its
    workers alike, and torchrun passes it on to them.

    Outside the main thread no signal can be caught, and nothing is.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._received_s = 0.0
        self._previous_handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        try:
            self._previous_handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
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
        """Which signal it was; on a rank that saw none, another rank's."""
        return "SIGTERM" if self.signal == signal.SIGTERM else "SIGINT"

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.signal is None:
            self.signal, self._received_s = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._received_s > REPEAT_S:
            self._restore_handlers()
            signal.raise_signal(number)

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._previous_handlers = {}
