"""Flight: this process's recorder of collectives. There is one, as there is one default group.

Whoever calls ``torch.distributed`` does it inside ``collective("all_reduce")``; whoever begins a
part of a step says so with ``at("forward")``. When a collective fails because a rank is missing,
the error that comes out names the rank (``verdict.py``). Without a group of ours nothing is sent
and errors are left as they are.
"""

import re
import time
from contextlib import nullcontext
from types import TracebackType

import torch
import torch.distributed as distributed

from moesaic.dist.marks import ALL, Book
from moesaic.dist.verdict import LostRankError
from moesaic.dist.watch import Watch

# What gloo, NCCL and the store say of a rank that is away; anything else is an error of the caller.
_AWAY = re.compile(
    r"timed? ?out|timeout|closed by peer|reset by peer|broken pipe|connection refused|"
    r"connectfullmesh|socket error|remote process|nccl error|net(work)? ?error|connection was",
    re.IGNORECASE,
)


class Flight:
    """See the module's first lines. ``waited_s`` is the time spent in collectives so far."""

    def __init__(self) -> None:
        self.waited_s = 0.0
        self._book = Book()
        self._watch: Watch | None = None

    def open(self, watch: Watch) -> None:
        """From now on write to the watch's book and ask it who is missing."""
        self._book, self._watch = watch.book, watch
        watch.start()

    def close(self) -> None:
        """Stop the watch."""
        watch, self._watch, self._book = self._watch, None, Book()
        if watch is not None:
            watch.close()

    def at(self, place: str, *, step: int | None = None) -> None:
        """Note a place of the step."""
        self._book.at(place, step=step)

    def enter(self, op: str, *, group: distributed.ProcessGroup | None) -> None:
        """Note a collective that begins."""
        name = _name(group)
        if self._watch is not None and group is not None:
            self._watch.meet(name, group=group)
        self._book.enter(op, group=name)

    def leave(self, *, seconds: float) -> None:
        """Note its end."""
        self._book.leave()
        self.waited_s += seconds

    def named(self, error: BaseException) -> BaseException:
        """Return the error that names the missing rank, or ``error`` if it is about none."""
        away = isinstance(error, RuntimeError) and _AWAY.search(str(error))
        if self._watch is None or not away:
            return error
        return LostRankError(self._watch.verdict(_first_line(error)))

    def failed(self, error: BaseException) -> BaseException:
        """Tell the others that this rank ends with ``error``.

        Returns it, or a better one that names a rank.
        """
        better = self.named(error)
        if self._watch is not None and not isinstance(better, LostRankError):
            self._watch.fail(f"{type(error).__name__}: {error}")
        return better


FLIGHT = Flight()


def at(place: str, *, step: int | None = None) -> None:
    """Say where in the step this rank is now; some microseconds, nothing is sent."""
    FLIGHT.at(place, step=step)


def collective(
    op: str, *, group: distributed.ProcessGroup | None = None
) -> "_Inside | nullcontext[None]":
    """Return a context for one collective of ``group`` (None: all ranks): ``with collective(...)``.

    All members must come to their group's collectives in the same order, as torch asks anyway.
    Raises LostRankError where torch says that a rank is away. A compiled graph notes nothing.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    return _Inside(op, group)


class _Inside:
    __slots__ = ("_began", "_group", "_op")

    def __init__(self, op: str, group: distributed.ProcessGroup | None) -> None:
        self._op, self._group = op, group

    def __enter__(self) -> None:
        FLIGHT.enter(self._op, group=self._group)
        self._began = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            FLIGHT.leave(seconds=time.perf_counter() - self._began)
            return
        better = FLIGHT.named(error)  # the mark stays inside: the others see where we waited
        if better is not error:
            raise better from error


def _name(group: distributed.ProcessGroup | None) -> str:
    if group is None or group is distributed.group.WORLD:
        return ALL
    return group.group_name


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]
