"""StopRequest: Ctrl-C and SIGTERM, turned into a wish that the loop reads between two steps."""

import signal
import time
from types import FrameType, TracebackType
from typing import Self

from moesaic.train.result import Ending

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
        self._noted_s = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        try:
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        except ValueError:  # not the main thread
            self._before = {}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._give_back()

    @property
    def asked(self) -> bool:
        return self.signal is not None

    @property
    def ending(self) -> Ending:
        """Which signal it was; on a rank that saw none, another rank's."""
        return "SIGTERM" if self.signal == signal.SIGTERM else "SIGINT"

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.signal is None:
            self.signal, self._noted_s = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._noted_s > REPEAT_S:
            self._give_back()
            signal.raise_signal(number)

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._before = {}
