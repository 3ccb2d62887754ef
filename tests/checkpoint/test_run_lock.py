import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moesaic.checkpoint.run_lock import STALE_S, LockOwner, RunLock
from moesaic.core.errors import CheckpointError
from moesaic.core.processes import process_start, process_state


def held_by(path: Path, **fields: object) -> None:
    owner = LockOwner.this_process().model_dump()
    path.write_text(json.dumps(owner | fields))


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_second_job_is_refused_and_the_first_named_until_it_releases(tmp_path: Path) -> None:
    path = tmp_path / "run" / "run.lock"
    lock = RunLock.acquire(path)
    with pytest.raises(CheckpointError, match=rf"in use: process {os.getpid()} on .* trains in it"):
        RunLock.acquire(path)
    lock.release()
    RunLock.acquire(path).release()
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("fields", [{"pid": 0}, {"boot": "another"}, {"start": "1"}])
def test_the_lock_of_a_process_that_is_gone_is_taken_over_and_said(
    tmp_path: Path, fields: dict[str, object]
) -> None:
    path = tmp_path / "run.lock"
    held_by(path, **({"pid": dead_process()} if "pid" in fields else fields))
    lock = RunLock.acquire(path)
    assert "took over run.lock: process" in lock.note
    assert LockOwner.read(path) == lock.owner
    lock.release()


def test_the_lock_of_a_process_that_its_parent_has_not_collected_is_taken_over(
    tmp_path: Path,
) -> None:
    path, process = tmp_path / "run.lock", subprocess.Popen([sys.executable, "-c", ""])
    start = process_start(process.pid)
    while process_state(process.pid) != "gone":
        time.sleep(0.005)
    held_by(path, pid=process.pid, start=start)
    lock = RunLock.acquire(path)
    assert "is gone" in lock.note
    lock.release()
    process.wait()


def test_the_lock_of_another_host_holds_while_it_is_touched(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    held_by(path, host="elsewhere")
    with pytest.raises(CheckpointError, match=r"on elsewhere trains in it since .*rm "):
        RunLock.acquire(path)
    old = path.stat().st_mtime - STALE_S - 1
    os.utime(path, (old, old))
    lock = RunLock.acquire(path)
    assert "was last seen" in lock.note
    lock.release()


def test_a_lock_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.lock: not a lock of a run.*remove it"):
        RunLock.acquire(path)


def test_a_released_lock_of_somebody_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    lock = RunLock.acquire(path)
    held_by(path, host="elsewhere")
    lock.release()
    assert LockOwner.read(path).host == "elsewhere"
