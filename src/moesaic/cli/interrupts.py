"""Ctrl-C on the command line: a plain stop with exit code 130, however often it is pressed."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Self

EXIT_CODE = 128 + signal.SIGINT
REPEAT_S = 1.0
_MESSAGE = b"stopped by Ctrl-C\n"


class InterruptHandler:
    """Context of a command. ``received`` is True once Ctrl-C was pressed.

    Until the command's own code runs nothing has been begun, and Ctrl-C ends the process at once.
    Afterwards the first one raises KeyboardInterrupt, so that files and workers are cleaned up;
    those within ``REPEAT_S`` of the last are the same wish; a later one does not wait for the
    cleaning. Outside the main thread Python cannot catch signals, so none is handled. While
    ``train`` runs its steps, it has a handler of its own, which saves.
    """

    def __init__(self, *, owns_process: bool, has_begun: Callable[[], bool]) -> None:
        """``owns_process``: the process is this command and ends with it."""
        self.received = False
        self._owns_process, self._has_begun, self._last_s = owns_process, has_begun, 0.0
        self._previous: Callable[[int, FrameType | None], object] | int | None = None

    def __enter__(self) -> Self:
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            return self  # as in the background of a shell script: Ctrl-C is not for this process
        with contextlib.suppress(ValueError):  # not the main thread
            self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is None:
            return
        if self._owns_process:  # what is left is the end of the interpreter
            silent = signal.SIG_IGN if self.received else signal.SIG_DFL
            signal.signal(signal.SIGINT, silent)
        else:
            signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        previous, self._last_s = self._last_s, time.monotonic()
        if self._owns_process and not self._has_begun():
            self._end_now()
        if not self.received:
            self.received = True
            raise KeyboardInterrupt
        if self._owns_process and self._last_s - previous > REPEAT_S:
            self._end_now()

    @staticmethod
    def _end_now() -> None:
        try:
            os.write(2, _MESSAGE)
        finally:
            os._exit(EXIT_CODE)


def stop_message() -> None:
    """Say on standard error that the command was stopped."""
    sys.stderr.write(_MESSAGE.decode())
