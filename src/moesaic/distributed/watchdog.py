"""Watch: a thread that tells the others where this rank is, and finds out who is missing.

Every rank posts its mark to the store that the ranks met in, some times a minute, and its failure
when it ends with one. The first rank whose collective fails reads the marks of all and posts a
verdict, so that all say the same. A rank that is still there a little after that (it hangs, or it
waits for one that does) prints where it is and ends itself.
"""

import faulthandler
import json
import os
import socket
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch.distributed as distributed

from moesaic.distributed.hang_report import (
    HangReport,
    LostRankError,
    Peer,
    ProcessState,
    find_lost_ranks,
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
    """The watch of one rank. ``store`` is a client of its own: a blocked one would hold it up.

    A job of which a rank died or hung ends about ``collective_timeout_s + grace_s`` later at most.
    """

    def __init__(
        self,
        store: distributed.Store,  # pyright: ignore[reportPrivateImportUsage]
        *,
        rank: int,
        size: int,
        timeout_s: float,
        heartbeat_file: HeartbeatFile,
    ) -> None:
        self.rank, self.size, self.heartbeat_file = rank, size, heartbeat_file
        self.interval_s = min(max(timeout_s / 30, _MIN_INTERVAL_S), _MAX_INTERVAL_S)
        self.grace_s = max(4 * self.interval_s, 1.0)
        self._timeout_s = timeout_s
        self._store = store
        self._store.set_timeout(timedelta(seconds=self.grace_s))
        self._groups = {DEFAULT_GROUP: tuple(range(size))}
        self._machine = _machine_id()
        self._num_heartbeats, self._failure = 0, ""
        self._warned = -1
        self._stop_event = Event()
        self._thread = Thread(target=self._run, daemon=True, name="watch")

    def start(self) -> None:
        """Post the first mark and go on posting."""
        with suppress(*_STORE_ERRORS):
            self._post_heartbeat()
        self._thread.start()

    def close(self) -> None:
        """Stop, and remove what was written on this machine."""
        self._stop_event.set()
        self._thread.join(timeout=self.grace_s)
        self.heartbeat_file.close()

    def add_group(self, name: str, *, group: distributed.ProcessGroup) -> None:
        """Learn the members of a group when it is first used."""
        if name not in self._groups:
            self._groups[name] = tuple(distributed.get_process_group_ranks(group))

    def post_failure(self, text: str) -> None:
        """Tell the others that this rank ends, and why."""
        self._failure = text
        with suppress(*_STORE_ERRORS):
            self._post_heartbeat()
            self._store.set("alarm", str(self.rank))

    def report_hang(self, cause: str) -> HangReport:
        """Return who is missing: the verdict of the first rank that asked, or our own.

        ``cause`` is what torch said.
        """
        try:
            self._store.set("alarm", str(self.rank))
            if (
                self._store.add("judges", 1) > 1
                and (first := self._wait_for_posted_report()) is not None
            ):
                return first
            verdict = self._find_lost_ranks(cause)
            self._store.set("verdict", json.dumps(verdict.to_dict()))
            return verdict
        except _STORE_ERRORS as error:
            where = self.heartbeat_file.read()
            doing = where.collective_text if where.in_collective else where.phase_text
            return HangReport(
                f"rank {self.rank} lost its peers in {doing}, and the store that they met in does "
                "not answer: the launcher, or rank 0 if it had none, ended first "
                f"({cause or error})"
            )

    def _wait_for_posted_report(self) -> HangReport | None:
        late = time.monotonic() + self.grace_s
        while time.monotonic() < late:
            if self._store.check(["verdict"]):
                return HangReport.from_dict(json.loads(self._store.get("verdict")))
            time.sleep(self.interval_s / 5)
        return None

    def _find_lost_ranks(self, cause: str = "") -> HangReport:
        """Read all marks; where only time tells whether a rank lives, give it two beats."""
        before = self._read_heartbeats()
        unsure = [rank for rank, seen in before.items() if self._needs_second_read(rank, seen)]
        for _ in range(3 if unsure else 0):
            time.sleep(0.8 * self.interval_s)
            self._post_heartbeat()  # this may be the thread that does it
        after = self._read_heartbeats()
        peers = {rank: self._peer(rank, after[rank], before[rank]) for rank in range(self.size)}
        return find_lost_ranks(peers[self.rank], peers=peers, now_s=time.time(), cause=cause)

    def _needs_second_read(self, rank: int, seen: dict[str, Any] | None) -> bool:
        if rank == self.rank or seen is None or seen["failure"]:
            return False
        # a process that is being killed closes its connections a little before it is gone
        return seen["machine"] != self._machine or process_state(seen["pid"]) == "alive"

    def _peer(self, rank: int, seen: dict[str, Any] | None, before: dict[str, Any] | None) -> Peer:
        if seen is None:
            return Peer(rank, members=self._groups[DEFAULT_GROUP], state="silent")
        mark = Heartbeat(**seen["mark"])
        state: ProcessState = "alive"
        if rank != self.rank and not seen["failure"]:
            here = seen["machine"] == self._machine
            silent = before is not None and before["beats"] == seen["beats"]
            state = process_state(seen["pid"]) if here else "silent" if silent else "alive"
            there = read_heartbeat_file(Path(seen["book"])) if here and seen["book"] else None
            mark = there if there is not None and there.serial >= mark.serial else mark
        process = f"{seen['pid']} on {seen['machine'].partition(' ')[0]}"
        return Peer(rank, mark, tuple(seen["members"]), process, state, seen["failure"])

    def _read_heartbeats(self) -> dict[int, dict[str, Any] | None]:
        self._post_heartbeat()
        found: dict[int, dict[str, Any] | None] = {}
        for rank in range(self.size):
            key = f"beat-{rank}"
            found[rank] = json.loads(self._store.get(key)) if self._store.check([key]) else None
        return found

    def _post_heartbeat(self) -> None:
        mark = self.heartbeat_file.read()
        self._num_heartbeats += 1
        seen = {
            "mark": {name: getattr(mark, name) for name in Heartbeat.__slots__},
            "members": self._groups.get(mark.group, self._groups[DEFAULT_GROUP]),
            "beats": self._num_heartbeats,
            "machine": self._machine,
            "pid": os.getpid(),
            "book": str(self.heartbeat_file.path or ""),
            "failure": self._failure,
        }
        self._store.set(f"beat-{self.rank}", json.dumps(seen))

    def _run(self) -> None:
        alarmed_s = None
        while not self._stop_event.wait(self.interval_s):
            with suppress(*_STORE_ERRORS):  # no store: the collectives will fail, and say so
                self._post_heartbeat()
                self._warn_if_stalled()
                if alarmed_s is None and self._store.check(["alarm"]):
                    alarmed_s = time.monotonic()
            if alarmed_s is not None and time.monotonic() - alarmed_s > self.grace_s:
                self._abort()

    def _warn_if_stalled(self) -> None:
        """Say once, at half of the patience, that this rank waits, and for whom.

        Also outside of a collective: with NCCL the host waits later than it asked.
        """
        mark = self.heartbeat_file.read()
        idle_s = time.time() - mark.time_s
        if idle_s < self._timeout_s / 2 or self._warned == mark.serial:
            return
        self._warned = mark.serial
        verdict = self._find_lost_ranks()
        if not verdict.ranks and not mark.in_collective:
            return  # nobody is behind: this rank is at work, or all are
        if self._store.add(f"warned-{mark.group}-{mark.sequence_number}", 1) == 1:
            _print_stderr(f"moesaic: nothing has moved for {idle_s:.0f} s: {verdict.sentence}")

    def _abort(self) -> None:
        with suppress(*_STORE_ERRORS):
            verdict = self.report_hang("another rank ended")
            if not self._stop_event.is_set():
                lost = LostRankError(verdict)
                _print_stderr(f"moesaic: rank {self.rank} ends itself: {lost}. It was here:")
                faulthandler.dump_traceback(file=2, all_threads=True)
        if not self._stop_event.is_set():
            os._exit(1)


def process_state(pid: int) -> ProcessState:
    """Return whether a process of this machine runs, is stopped or is gone (Linux; else alive)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return "gone" if Path("/proc/self/stat").exists() else "alive"
    except OSError:
        return "alive"
    letter = text.rpartition(")")[2].split()[0]
    states: dict[str, ProcessState] = {"Z": "gone", "X": "gone", "T": "stopped", "t": "stopped"}
    return states.get(letter, "alive")


def _machine_id() -> str:
    """This machine as others may know it; with its name space, for containers share a name."""
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {space}"


def _print_stderr(text: str) -> None:
    print(text, file=sys.__stderr__, flush=True)
