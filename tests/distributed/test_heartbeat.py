"""The heartbeat file has the last heartbeat, also when the process was killed."""

import os
import signal
from multiprocessing import get_context
from pathlib import Path

import pytest

from moesaic.distributed.heartbeat import (
    DEFAULT_GROUP,
    Heartbeat,
    HeartbeatFile,
    read_heartbeat_file,
)


def _write(book: HeartbeatFile) -> None:
    book.mark_phase("forward", step=7)
    book.begin_collective("all_reduce", group=DEFAULT_GROUP)
    book.end_collective()
    book.begin_collective("all_to_all", group="experts")
    book.end_collective()
    book.mark_phase("sum of gradients")
    book.begin_collective("all_reduce", group=DEFAULT_GROUP)


@pytest.mark.parametrize("kept", ["in memory", "in a file"])
def test_read_returns_the_last_heartbeat(kept: str, tmp_path: Path) -> None:
    book = HeartbeatFile(tmp_path / "book" if kept == "in a file" else None)
    assert book.read() == Heartbeat(collective_counts={})
    _write(book)
    mark = book.read()
    assert (mark.op, mark.group, mark.sequence_number, mark.in_collective) == (
        "all_reduce",
        DEFAULT_GROUP,
        2,
        True,
    )
    assert mark.collective_counts == {DEFAULT_GROUP: 2, "experts": 1}
    assert mark.collective_text == "all_reduce #2 (step 7, sum of gradients)"
    assert (mark.collectives_entered("experts"), mark.collectives_entered("nobody")) == (1, 0)
    book.end_collective()
    assert not book.read().in_collective
    assert book.read().serial == mark.serial + 1


def _write_and_die(path: Path) -> None:
    _write(HeartbeatFile(path))
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_file_of_a_killed_process_has_its_last_heartbeat(tmp_path: Path) -> None:
    writer = get_context("fork").Process(target=_write_and_die, args=(tmp_path / "book",))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    mark = read_heartbeat_file(tmp_path / "book")
    assert mark is not None
    assert mark.collective_text == "all_reduce #2 (step 7, sum of gradients)"
    assert mark.in_collective


def test_many_groups_and_long_names_fit_into_the_file(tmp_path: Path) -> None:
    book = HeartbeatFile()
    for index in range(300):
        book.begin_collective("a" * 99, group=f"{index}-{'g' * 99}")
        book.end_collective()
    assert 100 < len(book.read().collective_counts or {}) < 300, (
        "those beyond the last share its place"
    )
    assert read_heartbeat_file(tmp_path / "none") is None


def test_close_removes_the_file(tmp_path: Path) -> None:
    book = HeartbeatFile(tmp_path / "book")
    book.close()
    assert list(tmp_path.iterdir()) == []
