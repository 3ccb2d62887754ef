"""Boards for a call of ``train``: what a person sees, or nothing."""

from collections.abc import Callable, Mapping

from moesaic.observe.console import Board, Status, open_board

MakeBoard = Callable[[Status], Board]


def on_terminal(status: Status) -> Board:
    """A live table on a terminal, plain lines elsewhere; on standard error."""
    return open_board(status=status)


def silent(status: Status) -> Board:  # noqa: ARG001
    """Nothing at all: other ranks, tests, and callers with a board of their own."""
    return SilentBoard()


class SilentBoard:
    """The null object of boards."""

    def open(self) -> None: ...

    def tick(self, step: int) -> None: ...

    def show(self, values: Mapping[str, float], *, health: str = "") -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...
