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

from moesaic.distributed.hang_report import LostRankError
from moesaic.distributed.heartbeat import DEFAULT_GROUP, HeartbeatFile
from moesaic.distributed.watchdog import Watchdog

# What gloo, NCCL and the store say of a rank that is away; anything else is an error of the caller.
_LOST_PEER = re.compile(
    r"timed? ?out|timeout|closed by peer|reset by peer|broken pipe|connection refused|"
    r"connectfullmesh|socket error|remote process|nccl error|net(work)? ?error|connection was",
    re.IGNORECASE,
)


class FlightRecorder:
    """See the module's first lines. ``collective_s`` is the time spent in collectives so far."""

    def __init__(self) -> None:
        self.collective_s = 0.0
        self._heartbeat = HeartbeatFile()
        self._watchdog: Watchdog | None = None

    def open(self, watchdog: Watchdog) -> None:
        """From now on write to the watch's book and ask it who is missing."""
        self._heartbeat, self._watchdog = watchdog.heartbeat_file, watchdog
        watchdog.start()

    def close(self) -> None:
        """Stop the watch."""
        watch, self._watchdog, self._heartbeat = self._watchdog, None, HeartbeatFile()
        if watch is not None:
            watch.close()

    def mark_phase(self, phase: str, *, step: int | None = None) -> None:
        """Note a place of the step."""
        self._heartbeat.mark_phase(phase, step=step)

    def begin_collective(self, op: str, *, group: distributed.ProcessGroup | None) -> None:
        """Note a collective that begins."""
        name = _group_name(group)
        if self._watchdog is not None and group is not None:
            self._watchdog.add_group(name, group=group)
        self._heartbeat.begin_collective(op, group=name)

    def end_collective(self, *, seconds: float) -> None:
        """Note its end."""
        self._heartbeat.end_collective()
        self.collective_s += seconds

    def name_lost_rank(self, error: BaseException) -> BaseException:
        """Return the error that names the missing rank, or ``error`` if it is about none."""
        away = isinstance(error, RuntimeError) and _LOST_PEER.search(str(error))
        if self._watchdog is None or not away:
            return error
        return LostRankError(self._watchdog.report_hang(_first_line(error)))

    def report_failure(self, error: BaseException) -> BaseException:
        """Tell the others that this rank ends with ``error``.

        Returns it, or a better one that names a rank.
        """
        better = self.name_lost_rank(error)
        if self._watchdog is not None and not isinstance(better, LostRankError):
            self._watchdog.post_failure(f"{type(error).__name__}: {error}")
        return better


FLIGHT_RECORDER = FlightRecorder()


def mark_phase(phase: str, *, step: int | None = None) -> None:
    """Say where in the step this rank is now; some microseconds, nothing is sent."""
    FLIGHT_RECORDER.mark_phase(phase, step=step)


def record_collective(
    op: str, *, group: distributed.ProcessGroup | None = None
) -> "_RecordedCollective | nullcontext[None]":
    """Return a context for one collective of ``group`` (None: all ranks): ``with collective(...)``.

    All members must come to their group's collectives in the same order, as torch asks anyway.
    Raises LostRankError where torch says that a rank is away. A compiled graph notes nothing.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    return _RecordedCollective(op, group)


class _RecordedCollective:
    __slots__ = ("_began", "_group", "_op")

    def __init__(self, op: str, group: distributed.ProcessGroup | None) -> None:
        self._op, self._group = op, group

    def __enter__(self) -> None:
        FLIGHT_RECORDER.begin_collective(self._op, group=self._group)
        self._began = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            FLIGHT_RECORDER.end_collective(seconds=time.perf_counter() - self._began)
            return
        better = FLIGHT_RECORDER.name_lost_rank(
            error
        )  # the mark stays inside: the others see where we waited
        if better is not error:
            raise better from error


def _group_name(group: distributed.ProcessGroup | None) -> str:
    if group is None or group is distributed.group.WORLD:
        return DEFAULT_GROUP
    return group.group_name


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]
