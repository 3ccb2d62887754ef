"""Run lock: one job at a time trains in a run directory.

``run.lock`` names its owner: host, boot, process and start of the process. It is created with
O_EXCL, which holds on NFS too, and touched every ``TOUCH_S`` seconds. A lock is stale if its
process is gone (on this host), or if nobody touched it for ``STALE_S`` seconds (from another host,
by the clock of the file system). Rank 0 holds it for all ranks of a job.
"""

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from typing import ClassVar

from pydantic import Field

from moesaic.core.errors import CheckpointError, printable
from moesaic.core.file_reader import KIB, MAX_INT, FileKind, FileShape
from moesaic.core.files import make_dir, os_errors_named
from moesaic.core.processes import process_start, process_state
from moesaic.core.units import show_seconds

LOCK_FILE = FileKind(
    name="lock of a run", max_bytes=4 * KIB, error=CheckpointError, way_out="remove it"
)
TOUCH_S = 30.0
STALE_S = 600.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class LockOwner(FileShape):
    """The process that holds a lock. ``boot`` and ``start`` tell it from a later one of its id."""

    kind: ClassVar[FileKind] = LOCK_FILE
    host: str
    boot: str
    pid: int = Field(ge=1, le=MAX_INT)
    start: str
    since: str

    @classmethod
    def this_process(cls) -> "LockOwner":
        """Return the owner that this process is."""
        pid = os.getpid()
        since = datetime.now(UTC).isoformat(timespec="seconds")
        host = socket.gethostname()
        return cls(host=host, boot=_boot(), pid=pid, start=process_start(pid), since=since)

    def is_alive(self) -> bool | None:
        """Return whether the process runs; None if it is on another host."""
        if self.host != socket.gethostname():
            return None
        if self.boot != _boot():
            return False
        return process_state(self.pid) != "gone" and process_start(self.pid) == self.start


@dataclass(frozen=True, slots=True)
class RunLock:
    """A lock that this process holds. ``note`` says which stale lock it replaced, if any."""

    path: Path
    owner: LockOwner
    note: str
    stopped: Event

    @classmethod
    def acquire(cls, path: Path) -> "RunLock":
        """Create the lock. Raises CheckpointError that names the process which holds it."""
        owner, note = LockOwner.this_process(), ""
        make_dir(path.parent)
        if not _create(path, owner):
            note = _remove_stale(path)
            if not _create(path, owner):
                raise CheckpointError(_describe_held(path))
        lock = cls(path, owner, note, Event())
        Thread(target=lock._keep_fresh, daemon=True, name="run lock").start()
        return lock

    def release(self) -> None:
        """Remove the lock if it is still this process's."""
        self.stopped.set()
        with suppress(OSError, CheckpointError):
            if LockOwner.read(self.path) == self.owner:
                self.path.unlink()

    def _keep_fresh(self) -> None:
        while not self.stopped.wait(TOUCH_S):
            with suppress(OSError):
                os.utime(self.path)


def _create(path: Path, owner: LockOwner) -> bool:
    """Create the lock with its content; return False if there is one."""
    part = path.with_name(f".{path.name}.{owner.pid}.part")
    with os_errors_named(path, action="cannot be created"):
        try:
            part.write_text(owner.model_dump_json() + "\n")
            os.link(part, path)  # fails if it exists; complete from the first moment
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            return _create_exclusively(path, owner)
        finally:
            with suppress(OSError):
                part.unlink()
    return True


def _create_exclusively(path: Path, owner: LockOwner) -> bool:
    try:
        with path.open("x") as stream:
            stream.write(owner.model_dump_json() + "\n")
    except FileExistsError:
        return False
    return True


def _remove_stale(path: Path) -> str:
    """Remove the lock of a process that is gone; return a note. Raises CheckpointError if held."""
    try:
        found = LockOwner.read(path)
    except CheckpointError:
        if not path.exists():
            return ""
        raise
    alive = found.is_alive()
    if alive or (alive is None and _age_s(path) < STALE_S):
        raise CheckpointError(_describe_held(path))
    aside = path.with_name(f".{path.name}.{os.getpid()}.stale")
    with suppress(FileNotFoundError):  # another process was faster
        path.rename(aside)
        if LockOwner.read(aside) != found:  # it was replaced in between
            aside.rename(path)
            raise CheckpointError(_describe_held(path))
        aside.unlink()
    why = "is gone" if alive is False else f"was last seen {show_seconds(STALE_S)} ago or more"
    return f"took over {path.name}: process {found.pid} on {printable(found.host)} {why}"


def _describe_held(path: Path) -> str:
    try:
        found = LockOwner.read(path)
        who = f"process {found.pid} on {printable(found.host)} trains in it"
        who += f" since {printable(found.since)}"
    except CheckpointError:
        who = "another process trains in it"
    return (
        f"{path.parent} is in use: {who}. Wait for it, stop it, or use another --out; if that "
        f"process is gone: rm {path}"
    )


def _age_s(path: Path) -> float:
    """Return the seconds since the lock was touched, by the clock of its file system."""
    probe = path.with_name(f".{path.name}.{os.getpid()}.clock")
    try:
        probe.touch()
        return max(0.0, probe.stat().st_mtime - path.stat().st_mtime)
    except OSError:
        return 0.0
    finally:
        with suppress(OSError):
            probe.unlink()


def _boot() -> str:
    with suppress(OSError):
        return _BOOT_ID.read_text(encoding="ascii").strip()
    return ""
