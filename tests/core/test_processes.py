"""Processes: their states, and what tells two of one number apart."""

import os
import signal
import time
from multiprocessing import get_context

from moesaic.core.processes import process_start, process_state


def _sleep() -> None:
    time.sleep(60)


def _until(pid: int, state: str) -> str:
    deadline = time.monotonic() + 10
    while process_state(pid) != state and time.monotonic() < deadline:
        time.sleep(0.005)
    return process_state(pid)


def test_process_state_is_alive_stopped_or_gone() -> None:
    process = get_context("fork").Process(target=_sleep)
    process.start()
    assert process.pid is not None
    assert process_state(process.pid) == "alive"
    os.kill(process.pid, signal.SIGSTOP)
    assert _until(process.pid, "stopped") == "stopped"
    process.kill()
    assert _until(process.pid, "gone") == "gone", "not collected by its parent, and yet gone"
    process.join()
    assert process_state(process.pid) == "gone"


def test_a_number_that_no_process_can_have_is_gone() -> None:
    assert process_state(2**62) == "gone"
    assert process_start(2**62) == ""
    assert process_start(os.getpid()) == process_start(os.getpid()) != ""
