"""Boards for a call of ``train``: what a person sees, or nothing."""

from collections.abc import Callable, Mapping

from moesaic.observe.console import ProgressDisplay, RunStatus, make_display

MakeDisplay = Callable[[RunStatus], ProgressDisplay]


def terminal_progress(status: RunStatus) -> ProgressDisplay:
    """A live table on a terminal, plain lines elsewhere; on standard error."""
    return make_display(status=status)


def no_progress(status: RunStatus) -> ProgressDisplay:  # noqa: ARG001
    """Nothing at all: other ranks, tests, and callers with a board of their own."""
    return NullDisplay()


class NullDisplay:
    """The null object of boards."""

    def open(self) -> None: ...

    def advance(self, step: int) -> None: ...

    def update_metrics(self, values: Mapping[str, float], *, health: str = "") -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...
