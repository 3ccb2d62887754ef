"""Processes of this machine: whether one runs, and when it began."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Literal


def process_state(pid: int) -> Literal["alive", "stopped", "gone"]:
    """Return whether a process runs, is stopped (SIGSTOP) or is gone, also if not yet collected.

    Where there is no ``/proc``, or it does not show the process, a stopped one counts as alive.
    """
    letter = _stat_fields(pid)[:1]
    if letter:
        return "gone" if letter[0] in "ZX" else "stopped" if letter[0] in "Tt" else "alive"
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return "gone"
    except OSError:  # of another user
        return "alive"
    return "alive"


def process_start(pid: int) -> str:
    """Return the start of a process, in clock ticks since boot; empty where /proc is missing."""
    return "".join(_stat_fields(pid)[19:20])


def _stat_fields(pid: int) -> list[str]:
    """Return the fields of ``/proc/PID/stat`` from the state on; none where it cannot be read."""
    with suppress(OSError):
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        return text.rpartition(")")[2].split()
    return []
