"""Watchdog: a thread per rank that posts its heartbeat to the store and reports missing ranks.

Every rank posts its heartbeat to the rendezvous store every few seconds or more often, and its
failure when it ends with one. The first rank whose collective fails reads all heartbeats and posts
a hang report, so that all ranks raise the same error. A rank that is still running after a grace
period (it hangs, or waits for one that does) prints its stack traces and exits.

N ranks send O(N) messages of O(1) bytes: one rank reads all heartbeats for all, and the members of
a group are posted once, by the first of them that posts a collective of it.
"""

import faulthandler
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch.distributed as distributed

from moesaic.core.processes import process_state
from moesaic.distributed.bounded_store import BoundedStore
from moesaic.distributed.hang_report import (
    HangReport,
    LostRankError,
    Peer,
    ProcessState,
    find_lost_ranks,
    find_stalled_ranks,
    report_unanswered_store,
)
from moesaic.distributed.heartbeat import (
    DEFAULT_GROUP,
    Heartbeat,
    HeartbeatFile,
    read_heartbeat_file,
)

_MAX_INTERVAL_S, _MIN_INTERVAL_S = 2.0, 0.1
_STORE_ERRORS = (RuntimeError, ValueError, OSError)  # torch's DistErrors are RuntimeErrors


class Watchdog:
    """The watchdog of one rank. ``store`` is its own client: a blocked one would delay it.

    ``store_rank`` is the rank whose process serves the store; None where the launcher does. A job
    in which a rank died or hung ends at most about ``timeout_s + 2 * grace_s`` later, also if that
    rank serves the store.
    """

    def __init__(
        self,
        store: distributed.Store,  # pyright: ignore[reportPrivateImportUsage]
        *,
        rank: int,
        size: int,
        timeout_s: float,
        heartbeat_file: HeartbeatFile,
        store_rank: int | None = None,
    ) -> None:
        self.rank, self.size, self.heartbeat_file = rank, size, heartbeat_file
        self.interval_s = min(max(timeout_s / 30, _MIN_INTERVAL_S), _MAX_INTERVAL_S)
        self.grace_s = max(4 * self.interval_s, 1.0)
        self._timeout_s = timeout_s
        self._store = BoundedStore(store, limit_s=self.grace_s)
        self._store_rank, self._store_owner = store_rank, None
        self._groups = {DEFAULT_GROUP: tuple(range(size))}
        self._posted_groups = {DEFAULT_GROUP}
        self._machine = _machine_id()
        self._num_heartbeats, self._failure = 0, ""
        self._warned_serial, self._searched_period = -1, 0
        self._stop_event = Event()
        self._thread = Thread(target=self._run, daemon=True, name="watchdog")

    def start(self) -> None:
        """Post the first heartbeat and start the thread."""
        with suppress(*_STORE_ERRORS):
            self._post_heartbeat()
        self._thread.start()

    def close(self) -> None:
        """Stop the thread and remove the heartbeat file."""
        self._stop_event.set()
        self._thread.join(timeout=self.grace_s)
        self._store.close()
        self.heartbeat_file.close()

    def add_group(self, name: str, *, group: distributed.ProcessGroup) -> None:
        """Store the members of a group when it is first used."""
        if name not in self._groups:
            self._groups[name] = tuple(distributed.get_process_group_ranks(group))

    def post_failure(self, text: str) -> None:
        """Post that this rank ends, and why."""
        self._failure = text
        with suppress(*_STORE_ERRORS):
            self._post_heartbeat()
            self._store.set("alarm", str(self.rank))

    def report_hang(self, cause: str) -> HangReport:
        """Return the report of the first rank that asked, or make and post it.

        ``cause`` is torch's error message.
        """
        try:
            self._store.set("alarm", str(self.rank))
            is_first = self._store.add("reporters", 1) == 1
            if not is_first and (posted := self._wait_for_posted_report()) is not None:
                return posted
            report = self._find_lost_ranks(cause)
            self._store.set("report", json.dumps(report.to_dict()))
            # at once: a launcher that has seen the exit of a rank ends this process before long
            _print_stderr(f"moesaic: {report.sentence}")
            return report
        except _STORE_ERRORS as error:
            me = Peer(self.rank, self.heartbeat_file.read())
            owner = None
            if self._store_rank is not None and self._store_owner is not None:
                owner = self._peer(self._store_rank, self._store_owner, self._store_owner)
            return report_unanswered_store(
                me, owner=owner, now_s=time.time(), cause=cause or str(error)
            )

    def _wait_for_posted_report(self) -> HangReport | None:
        deadline = time.monotonic() + self.grace_s
        while time.monotonic() < deadline:
            if (posted := self._store.read("report")) is not None:
                return HangReport.from_dict(json.loads(posted))
            time.sleep(self.interval_s / 5)
        return None

    def _find_lost_ranks(self, cause: str = "") -> HangReport:
        peers = self._read_peers()
        return find_lost_ranks(peers[self.rank], peers=peers, now_s=time.time(), cause=cause)

    def _read_peers(self) -> dict[int, Peer]:
        """Read all heartbeats; twice, two intervals apart, if a rank's state depends on it."""
        before = self._read_heartbeats()
        uncertain = [s for rank, s in before.items() if s and self._needs_second_read(rank, s)]
        for _ in range(3 if uncertain else 0):
            if self._wait_for_exit(uncertain, limit_s=0.8 * self.interval_s):
                break
            self._post_heartbeat()  # this may be the thread that posts them
        after = self._read_heartbeats()
        return {rank: self._peer(rank, after[rank], before[rank]) for rank in range(self.size)}

    def _needs_second_read(self, rank: int, seen: dict[str, Any]) -> bool:
        if rank == self.rank or seen["failure"]:
            return False
        # a process that is being killed closes its connections a little before it is gone
        return seen["machine"] != self._machine or process_state(seen["pid"]) == "alive"

    def _wait_for_exit(self, uncertain: Sequence[dict[str, Any]], *, limit_s: float) -> bool:
        """Wait until one of the processes is gone, if all are of this machine; return whether.

        The launcher ends this process as soon as it sees the exit: the report must be made first.
        Ranks of another machine need the whole time, in which they post their next heartbeat.
        """
        if any(seen["machine"] != self._machine for seen in uncertain):
            time.sleep(limit_s)
            return False
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if any(process_state(seen["pid"]) == "gone" for seen in uncertain):
                return True
            time.sleep(0.005)
        return False

    def _peer(self, rank: int, seen: dict[str, Any] | None, before: dict[str, Any] | None) -> Peer:
        if seen is None:
            return Peer(rank, members=self._groups[DEFAULT_GROUP], state="silent")
        heartbeat = Heartbeat(**seen["heartbeat"])
        state: ProcessState = "alive"
        if rank != self.rank and not seen["failure"]:
            same_machine = seen["machine"] == self._machine
            if same_machine:
                state = process_state(seen["pid"])
            elif before is not None and before["number"] == seen["number"]:
                state = "silent"
            in_file = read_heartbeat_file(Path(seen["file"])) if same_machine else None
            if in_file is not None and in_file.serial >= heartbeat.serial:
                heartbeat = in_file
        process = f"{seen['pid']} on {seen['machine'].partition(' ')[0]}"
        members = self._members(heartbeat.group)
        return Peer(rank, heartbeat, members, process, state, seen["failure"])

    def _members(self, group: str) -> tuple[int, ...]:
        """Return the ranks of a group; none where none of them has posted."""
        if group not in self._groups:
            with suppress(*_STORE_ERRORS):
                if (posted := self._store.read(f"members-{group}")) is not None:
                    self._groups[group] = tuple(json.loads(posted))
        return self._groups.get(group, ())

    def _read_heartbeats(self) -> dict[int, dict[str, Any] | None]:
        self._post_heartbeat()
        posted = self._store.read_all([f"heartbeat-{rank}" for rank in range(self.size)])
        texts = enumerate(posted.values())
        return {rank: None if text is None else json.loads(text) for rank, text in texts}

    def _read_heartbeat(self, rank: int) -> dict[str, Any] | None:
        posted = self._store.read(f"heartbeat-{rank}")
        return None if posted is None else json.loads(posted)

    def _post_heartbeat(self) -> None:
        heartbeat = self.heartbeat_file.read()
        self._num_heartbeats += 1
        posted = {
            "heartbeat": asdict(heartbeat),
            "number": self._num_heartbeats,
            "machine": self._machine,
            "pid": os.getpid(),
            "file": str(self.heartbeat_file.path or os.devnull),
            "failure": self._failure,
        }
        self._store.set(f"heartbeat-{self.rank}", json.dumps(posted))
        self._post_members(heartbeat.group)

    def _post_members(self, group: str) -> None:
        """Post the ranks of a group of this rank, unless another has."""
        if group not in self._posted_groups and group in self._groups:
            if not self._store.has(f"members-{group}"):
                self._store.set(f"members-{group}", json.dumps(self._groups[group]))
            self._posted_groups.add(group)

    def _run(self) -> None:
        alarm_s = None
        while not self._stop_event.wait(self.interval_s):
            try:
                self._post_heartbeat()
                self._warn_if_stalled()
                if self._store_rank is not None and self._store_owner is None:
                    self._store_owner = self._read_heartbeat(self._store_rank)
                if alarm_s is None and self._store.has("alarm"):
                    alarm_s = time.monotonic()
            except _STORE_ERRORS:
                # collectives fail and report it, but a rank may also wait for the store itself
                idle_s = time.time() - self.heartbeat_file.read().time_s
                if alarm_s is None and idle_s > self._timeout_s:
                    alarm_s = time.monotonic()
            if alarm_s is not None and time.monotonic() - alarm_s > self.grace_s:
                self._abort()

    def _warn_if_stalled(self) -> None:
        """Print once, after half of the timeout, that ranks wait, and for which ranks.

        Also outside of a collective: with NCCL the host waits later than it enqueued. Of all ranks
        that make no progress, one reads the heartbeats in each half of a timeout.
        """
        heartbeat, now_s, half_s = self.heartbeat_file.read(), time.time(), self._timeout_s / 2
        idle_s, period = now_s - heartbeat.time_s, int(now_s / half_s)
        if idle_s < half_s or heartbeat.serial == self._warned_serial:
            return
        if period == self._searched_period:
            return
        self._searched_period = period
        if self._store.add(f"search-{period}", 1) > 1:
            return
        self._warned_serial = heartbeat.serial
        peers = self._read_peers()
        report = find_stalled_ranks(peers[self.rank], peers=peers, now_s=time.time())
        if not report.ranks and not heartbeat.in_collective:
            return  # no rank is behind: this rank computes, or all do
        key = f"warned-{report.op}-{report.step}-{report.sequence_number}"
        if self._store.add(key, 1) == 1:
            _print_stderr(f"moesaic: no progress for {idle_s:.0f} s: {report.sentence}")

    def _abort(self) -> None:
        with suppress(*_STORE_ERRORS):
            report = self.report_hang("another rank ended")
            if not self._stop_event.is_set():
                error = LostRankError(report)
                _print_stderr(f"moesaic: rank {self.rank} exits: {error}. Its stack traces:")
                faulthandler.dump_traceback(file=2, all_threads=True)
        if not self._stop_event.is_set():
            os._exit(1)


def _machine_id() -> str:
    """Return this machine's name and process name space, for containers share a name."""
    name_space = ""
    with suppress(OSError):
        name_space = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {name_space}"


def _print_stderr(text: str) -> None:
    print(text, file=sys.__stderr__, flush=True)
