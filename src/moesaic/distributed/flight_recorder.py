"""Flight recorder: which collective and which phase of a step this process is in.

There is one recorder, as there is one default process group. Every call of ``torch.distributed`` is
made inside ``record_collective("all_reduce")``; every phase of a step begins with
``mark_phase("forward")``. When a collective fails because a rank is missing, the error that is
raised names the rank (``hang_report.py``). Without a group made by ``init_distributed`` nothing is
sent and errors are unchanged.
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

# What gloo, which raises bare RuntimeErrors, and NCCL say of a missing rank. NCCL's other errors
# (out of memory, a wrong argument) are this rank's own.
_GLOO_LOST_PEER = re.compile(
    r"timed? ?out|timeout|closed by peer|reset by peer|broken pipe|connection refused|"
    r"connectfullmesh|socket error|connection was",
    re.IGNORECASE,
)
_NCCL_LOST_PEER = re.compile(
    r"ncclremoteerror|remote (peer|process)|connection (closed|reset|refused)|broken pipe|"
    r"timed? ?out|timeout|socketprogress",
    re.IGNORECASE,
)


def is_lost_peer(error: BaseException) -> bool:
    """Return whether torch says with ``error`` that another rank or the store does not answer."""
    if isinstance(error, distributed.DistNetworkError | distributed.DistStoreError):
        return True
    if isinstance(error, distributed.DistBackendError):
        return _NCCL_LOST_PEER.search(str(error)) is not None
    is_gloo = type(error) is RuntimeError and "gloo" in str(error).casefold()
    return is_gloo and _GLOO_LOST_PEER.search(str(error)) is not None


class FlightRecorder:
    """Writes phases and collectives to this rank's heartbeat.

    ``collective_s`` is the time spent in collectives so far.
    """

    def __init__(self) -> None:
        self.collective_s = 0.0
        self._heartbeat = HeartbeatFile()
        self._watchdog: Watchdog | None = None

    def open(self, watchdog: Watchdog) -> None:
        """Start the watchdog; from now on write to its heartbeat file."""
        self._heartbeat, self._watchdog = watchdog.heartbeat_file, watchdog
        watchdog.start()

    def close(self) -> None:
        """Stop the watchdog."""
        watchdog, self._watchdog, self._heartbeat = self._watchdog, None, HeartbeatFile()
        if watchdog is not None:
            watchdog.close()

    def mark_phase(self, phase: str, *, step: int | None = None) -> None:
        """Record the phase of the step that begins."""
        self._heartbeat.mark_phase(phase, step=step)

    def begin_collective(self, op: str, *, group: distributed.ProcessGroup | None) -> None:
        """Record the start of a collective."""
        name = _group_name(group)
        if self._watchdog is not None and group is not None:
            self._watchdog.add_group(name, group=group)
        self._heartbeat.begin_collective(op, group=name)

    def end_collective(self, *, seconds: float) -> None:
        """Record its end."""
        self._heartbeat.end_collective()
        self.collective_s += seconds

    def name_lost_rank(self, error: BaseException) -> BaseException:
        """Return the error that names the missing rank; ``error`` itself if none is missing."""
        if self._watchdog is None or not is_lost_peer(error):
            return error
        first_line = str(error).partition("\n")[0][:200]
        return LostRankError(self._watchdog.report_hang(first_line))

    def report_failure(self, error: BaseException) -> BaseException:
        """Post to the other ranks that this one ends with ``error``.

        Returns ``error``, or the one that names a lost rank.
        """
        named = self.name_lost_rank(error)
        if self._watchdog is not None and not isinstance(named, LostRankError):
            self._watchdog.post_failure(f"{type(error).__name__}: {error}")
        return named


FLIGHT_RECORDER = FlightRecorder()


def mark_phase(phase: str, *, step: int | None = None) -> None:
    """Record the phase of the step that this rank begins: some microseconds, nothing is sent."""
    FLIGHT_RECORDER.mark_phase(phase, step=step)


def record_collective(
    op: str, *, group: distributed.ProcessGroup | None = None
) -> "_RecordedCollective | nullcontext[None]":
    """Return a context manager that records one collective of ``group`` (None: all ranks).

    All members must call their group's collectives in the same order, as torch requires anyway.
    Raises LostRankError where torch reports a missing rank. A compiled graph records nothing.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    return _RecordedCollective(op, group)


class _RecordedCollective:
    __slots__ = ("_group", "_op", "_started")

    def __init__(self, op: str, group: distributed.ProcessGroup | None) -> None:
        self._op, self._group = op, group

    def __enter__(self) -> None:
        FLIGHT_RECORDER.begin_collective(self._op, group=self._group)
        self._started = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            FLIGHT_RECORDER.end_collective(seconds=time.perf_counter() - self._started)
            return
        # the heartbeat stays inside the collective: the other ranks see where this one waited
        named = FLIGHT_RECORDER.name_lost_rank(error)
        if named is not error:
            raise named from error


def _group_name(group: distributed.ProcessGroup | None) -> str:
    if group is None or group is distributed.group.WORLD:
        return DEFAULT_GROUP
    return group.group_name
