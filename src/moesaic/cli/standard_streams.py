"""Standard input, output and error in UTF-8, whatever the locale, also where one is closed."""

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator


def prepare_standard_streams() -> None:
    """Make the three streams open and UTF-8. Called once, before anything is read or written.

    A closed stream is opened on the null device, so that no other file gets its number: input is
    empty, output fails when it is written (as it would have), messages are lost.
    """
    if sys.stdin is None:
        sys.stdin = _open_null(0, os.O_RDONLY)
    if sys.stdout is None:
        sys.stdout = _open_null(1, os.O_RDONLY)  # a result that nobody gets is an error
    if sys.stderr is None:
        sys.stderr = _open_null(2, os.O_WRONLY)
    _use_utf8(sys.stdin, errors="strict")
    _use_utf8(sys.stdout, errors="backslashreplace")  # a lone surrogate of a file name, say
    _use_utf8(sys.stderr, errors="backslashreplace")


@contextlib.contextmanager
def named_stdout() -> Iterator[None]:
    """Context in which standard output is written: its errors, which have no path, get a name."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = "standard output"
        raise


def discard_stdout() -> None:
    """Send what is left to the null device: standard output failed, and is flushed at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def is_reader_gone() -> bool:
    """Return whether standard output is a pipe whose reader has ended, as after ``| head``."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):  # no file, or a system without poll
        return True


def _open_null(number: int, flags: int) -> io.TextIOWrapper:
    opened = os.open(os.devnull, flags)
    if opened != number:
        os.dup2(opened, number)
        os.close(opened)
    raw = io.FileIO(number, "r" if number == 0 else "w", closefd=False)
    buffered = io.BufferedReader(raw) if number == 0 else io.BufferedWriter(raw)
    return io.TextIOWrapper(buffered, encoding="utf-8", line_buffering=number == 2)


def _use_utf8(stream: object, *, errors: str) -> None:
    if isinstance(stream, io.TextIOWrapper):  # not a replacement, such as that of a notebook
        stream.reconfigure(encoding="utf-8", errors=errors)
