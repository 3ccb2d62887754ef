"""The watchdog: a store that does not answer, and warnings."""

import os
import time
from datetime import timedelta

import pytest
import torch.distributed as distributed

from moesaic.distributed import watchdog as watchdog_module
from moesaic.distributed.heartbeat import DEFAULT_GROUP, HeartbeatFile
from moesaic.distributed.watchdog import Watchdog


def _watchdogs(timeout_s: float) -> tuple[list[Watchdog], distributed.TCPStore]:
    server = distributed.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5)
    )
    clients = [distributed.TCPStore("127.0.0.1", server.port, is_master=False) for _ in range(2)]
    made = [
        Watchdog(client, rank=rank, size=2, timeout_s=timeout_s, heartbeat_file=HeartbeatFile())
        for rank, client in enumerate(clients)
    ]
    return made, server


def _printed_while_rank_1_is_late(monkeypatch: pytest.MonkeyPatch, *, inside: bool) -> list[str]:
    printed: list[str] = []
    monkeypatch.setattr(watchdog_module, "_print_stderr", printed.append)
    (first, second), server = _watchdogs(timeout_s=1.0)
    first.start()
    second.start()
    for watchdog in (first, second):
        watchdog.heartbeat_file.mark_phase("forward", step=3)
    first.heartbeat_file.begin_collective("all_reduce", group=DEFAULT_GROUP)
    if not inside:
        first.heartbeat_file.end_collective()
    deadline = time.monotonic() + 10
    while not printed and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)
    first.close()
    second.close()
    del server
    return printed


@pytest.mark.parametrize("inside", [True, False], ids=["as with gloo", "as with NCCL"])
def test_a_lost_rank_is_printed_at_half_of_the_timeout(
    monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    (warning,) = _printed_while_rank_1_is_late(monkeypatch, inside=inside)
    assert "no progress for" in warning
    assert "rank 1 did not reach all_reduce #1 (step 3, forward)" in warning
    assert ("where rank 0 waited" in warning) == inside


def test_working_ranks_print_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[str] = []
    monkeypatch.setattr(watchdog_module, "_print_stderr", printed.append)
    watchdogs, server = _watchdogs(timeout_s=0.4)
    for watchdog in watchdogs:
        watchdog.start()
        watchdog.heartbeat_file.mark_phase("forward", step=3)
    time.sleep(0.9)
    for watchdog in watchdogs:
        watchdog.close()
    del server
    assert printed == []


def test_all_ranks_raise_the_report_of_the_first() -> None:
    (first, second), server = _watchdogs(timeout_s=1.0)
    first.start()
    second.start()
    first.heartbeat_file.begin_collective("all_reduce", group=DEFAULT_GROUP)
    expected = first.report_hang("first")
    second.heartbeat_file.begin_collective("all_reduce", group=DEFAULT_GROUP)
    assert second.report_hang("second") == expected
    assert expected.ranks == (1,)
    first.close()
    second.close()
    del server


def test_a_rank_of_another_machine_is_silent_without_new_heartbeats(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = iter(["here 1", "there 2"])
    monkeypatch.setattr(watchdog_module, "_machine_id", lambda: next(names))
    (first, second), server = _watchdogs(timeout_s=1.0)
    first.start()
    second.start()
    first.heartbeat_file.begin_collective("all_reduce", group=DEFAULT_GROUP)
    assert "is alive but makes no progress" in first._find_lost_ranks().sentence
    second.close()
    sentence = first._find_lost_ranks().sentence
    assert f"its process {os.getpid()} on there sends no heartbeat" in sentence
    first.close()
    del server


def test_a_store_that_does_not_answer_is_reported() -> None:
    (first, _), server = _watchdogs(timeout_s=1.0)
    first.heartbeat_file.mark_phase("forward", step=3)
    first.heartbeat_file.begin_collective("all_reduce", group=DEFAULT_GROUP)
    del server
    report = first.report_hang("timed out")
    assert report.ranks == ()
    assert "rank 0 lost its peers in all_reduce #1 (step 3, forward)" in report.sentence
    assert "does not answer" in report.sentence


def test_ranks_of_another_machine_get_their_time_although_one_of_this_machine_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    names = iter(["here 1", "there 2", "here 1"])
    monkeypatch.setattr(watchdog_module, "_machine_id", lambda: next(names))
    first, other, gone = (
        Watchdog(
            distributed.TCPStore("127.0.0.1", server.port, is_master=False),
            rank=rank,
            size=3,
            timeout_s=1.0,
            heartbeat_file=HeartbeatFile(),
        )
        for rank in range(3)
    )
    with monkeypatch.context() as patch:
        patch.setattr(watchdog_module.os, "getpid", lambda: 2**30)  # no process has this number
        gone._post_heartbeat()
    first.start()
    other.start()
    first.heartbeat_file.begin_collective("all_reduce", group=DEFAULT_GROUP)
    other.heartbeat_file.begin_collective("all_reduce", group=DEFAULT_GROUP)
    report = first._find_lost_ranks()
    first.close()
    other.close()
    assert report.ranks == (2,), "rank 1 posts heartbeats, it only waits as well"
    assert "sends no heartbeat" not in report.sentence
