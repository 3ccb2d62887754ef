"""Calls of the store have a limit, whatever the process that serves it does."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from threading import Event, current_thread

import pytest
import torch.distributed as distributed

from moesaic.core.errors import UserError
from moesaic.distributed.bounded_store import BoundedCaller, BoundedStore, UnansweredError
from moesaic.distributed.heartbeat import DEFAULT_GROUP, HeartbeatFile
from moesaic.distributed.initialize import init_distributed
from moesaic.distributed.watchdog import Watchdog


def test_a_call_that_does_not_return_is_given_up_and_later_calls_are_refused_until_it_does() -> (
    None
):
    call, answered = BoundedCaller(limit_s=0.5, name="test"), Event()
    thread = call(current_thread)
    with pytest.raises(ZeroDivisionError):
        call(lambda: 1 // 0)
    with pytest.raises(TimeoutError, match="its own"):
        call(lambda: (_ for _ in ()).throw(TimeoutError("its own")))
    with pytest.raises(UnansweredError, match="no answer within"):
        call(answered.wait)
    with pytest.raises(UnansweredError, match="earlier call"):
        call(lambda: 3)
    answered.set()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            assert call(lambda: 4) == 4
            break
        except UnansweredError:
            time.sleep(0.005)
    else:
        pytest.fail("the caller must work again when the call has returned")
    call.close()
    thread.join(timeout=10)
    assert not thread.is_alive()


def _serve(connection: Connection) -> None:
    store = distributed.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5)
    )
    serving = Watchdog(
        store, rank=0, size=2, timeout_s=1.0, heartbeat_file=HeartbeatFile(), store_rank=0
    )
    serving.start()
    connection.send(store.port)
    connection.recv()


@pytest.fixture
def stopped_server() -> Iterator[tuple[int, int]]:
    """A process with rank 0's watchdog that serves the store: its port and process id."""
    here, there = Pipe()
    process = get_context("fork").Process(target=_serve, args=(there,))
    process.start()
    assert process.pid is not None
    try:
        yield here.recv(), process.pid
    finally:
        process.kill()
        process.join()


def test_a_stopped_rank_that_serves_the_store_is_named(stopped_server: tuple[int, int]) -> None:
    port, pid = stopped_server
    client = distributed.TCPStore("127.0.0.1", port, is_master=False)
    watchdog = Watchdog(
        client, rank=1, size=2, timeout_s=1.0, heartbeat_file=HeartbeatFile(), store_rank=0
    )
    watchdog.start()
    deadline = time.monotonic() + 10
    while watchdog._store_owner is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(pid, signal.SIGSTOP)
    watchdog.heartbeat_file.mark_phase("forward", step=3)
    watchdog.heartbeat_file.begin_collective("all_reduce", group=DEFAULT_GROUP)
    report = watchdog.report_hang("Timed out waiting 1000ms")
    watchdog.close()
    assert report.ranks == (0,)
    assert "rank 1 lost its peers in all_reduce #1 (step 3, forward)" in report.sentence
    assert "which rank 0 serves, does not answer" in report.sentence
    assert f"its process {pid} on" in report.sentence
    assert "is stopped (SIGSTOP)" in report.sentence


def test_no_call_of_a_stopped_store_blocks(stopped_server: tuple[int, int]) -> None:
    port, pid = stopped_server
    client = distributed.TCPStore("127.0.0.1", port, is_master=False)
    store = BoundedStore(client, limit_s=2.0)
    store.set("key", "value")
    assert (store.has("key"), store.has("other")) == (True, False)
    assert (store.read("key"), store.read("other"), store.add("n", 2)) == (b"value", None, 2)
    os.kill(pid, signal.SIGSTOP)
    for action in (
        lambda: store.read("key"),
        lambda: store.add("n", 1),
        lambda: store.has("key"),
    ):
        with pytest.raises(UnansweredError):
            action()


def _environment(monkeypatch: pytest.MonkeyPatch, **changed: str) -> None:
    usual = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (usual | {"MASTER_PORT": "29500"} | changed).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


@pytest.mark.parametrize("rank", ["0", "1"], ids=["as the server", "as a client"])
def test_a_port_at_which_something_else_listens_is_refused(
    monkeypatch: pytest.MonkeyPatch, rank: str
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        _environment(monkeypatch, MASTER_PORT=port, RANK=rank)
        with (
            pytest.raises(UserError, match=f"127.0.0.1:{port}.*no other program uses the port"),
            init_distributed(timeout_s=0.2, device="cpu"),
        ):
            pass


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("RANK", "x", "from 0 to 1"),
        ("RANK", "2", "from 0 to 1"),
        ("RANK", "-1", "from 0 to 1"),
        ("RANK", "", "from 0 to 1"),
        ("RANK", "9" * 5000, "from 0 to 1"),
        ("RANK", "\u0661", "from 0 to 1"),
        ("WORLD_SIZE", "0", "from 1 to"),
        ("WORLD_SIZE", "2.5", "from 1 to"),
        ("LOCAL_RANK", "x", "from 0 to"),
        ("MASTER_PORT", "abc", "from 1 to 65535"),
        ("MASTER_PORT", "99999", "from 1 to 65535"),
        ("MASTER_PORT", "-1", "from 1 to 65535"),
    ],
)
def test_a_number_of_the_environment_out_of_range_is_refused_with_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str
) -> None:
    _environment(monkeypatch, **{name: value})
    with (
        pytest.raises(UserError, match=f"{name}: found .*{expected}"),
        init_distributed(device="cpu"),
    ):
        pass
