"""The flight recorder: which errors it replaces, and what it counts."""

import time

import pytest
import torch
import torch.distributed as distributed

from moesaic.distributed import flight_recorder
from moesaic.distributed.flight_recorder import (
    FLIGHT_RECORDER,
    FlightRecorder,
    mark_phase,
    record_collective,
)
from moesaic.distributed.hang_report import HangReport, LostRankError
from moesaic.distributed.heartbeat import DEFAULT_GROUP, HeartbeatFile


class FakeWatchdog:
    """A watchdog whose report is constant."""

    def __init__(self) -> None:
        self.heartbeat_file = HeartbeatFile()
        self.posted: list[str] = []
        self.causes: list[str] = []

    def start(self) -> None: ...

    def close(self) -> None: ...

    def post_failure(self, text: str) -> None:
        self.posted.append(text)

    def report_hang(self, cause: str) -> HangReport:
        self.causes.append(cause)
        return HangReport("rank 3 is gone", (3,))


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> FakeWatchdog:
    watchdog = FakeWatchdog()
    here = FlightRecorder()
    here.open(watchdog)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(flight_recorder, "FLIGHT_RECORDER", here)
    return watchdog


GLOO = "[/build/third_party/gloo/gloo/transport/tcp/pair.cc:537]"
LOST_PEER = [
    RuntimeError(f"{GLOO} Timed out waiting 3000ms for recv operation"),
    RuntimeError(f"{GLOO} Connection closed by peer [127.0.0.1]:4321"),
    RuntimeError("Gloo connectFullMesh failed with Connection refused"),
    distributed.DistNetworkError("The client socket has timed out"),
    distributed.DistStoreError("wait timeout after 3000ms"),
    distributed.DistBackendError("NCCL error: ncclRemoteError: a remote process exited"),
    distributed.DistBackendError("NCCL error: ncclSystemError: Connection closed by remote peer"),
]
OTHER = [
    RuntimeError("shape [2] does not match [3]"),
    RuntimeError("the licence server: connection refused, timed out"),
    RuntimeError(f"{GLOO} op.preamble.length <= op.nbytes"),
    distributed.DistBackendError(
        "NCCL error: ncclUnhandledCudaError: Cuda failure 2 out of memory"
    ),
    distributed.DistBackendError("NCCL error: ncclInvalidUsage: two ranks on one GPU"),
    torch.OutOfMemoryError("CUDA out of memory, timeout"),
    KeyError("timeout"),
]


@pytest.mark.parametrize("error", LOST_PEER, ids=str)
def test_an_error_about_a_lost_rank_names_it(found: FakeWatchdog, error: RuntimeError) -> None:
    mark_phase("forward", step=2)
    with (
        pytest.raises(LostRankError, match="rank 3 is gone") as caught,
        record_collective("all_reduce"),
    ):
        raise error
    assert caught.value.__cause__ is error
    assert found.causes == [str(error)]
    assert found.heartbeat_file.read().in_collective, "the others must see where this rank waited"


@pytest.mark.parametrize("error", OTHER, ids=str)
def test_an_error_of_this_rank_is_unchanged(found: FakeWatchdog, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, record_collective("all_reduce"):
        raise error
    assert caught.value is error
    assert flight_recorder.FLIGHT_RECORDER.report_failure(error) is error
    assert found.causes == []


def test_without_a_watchdog_no_error_is_changed() -> None:
    with pytest.raises(RuntimeError, match="Timed out"), record_collective("all_reduce"):
        raise RuntimeError("Timed out")


def test_a_failure_is_posted_to_the_other_ranks(found: FakeWatchdog) -> None:
    error = ValueError("no")
    assert flight_recorder.FLIGHT_RECORDER.report_failure(error) is error
    assert found.posted == ["ValueError: no"]
    lost = flight_recorder.FLIGHT_RECORDER.report_failure(LOST_PEER[0])
    assert isinstance(lost, LostRankError)
    assert found.posted == ["ValueError: no"], "one that lost its peers is no cause"


def test_time_in_collectives_is_counted(found: FakeWatchdog) -> None:
    with record_collective("all_reduce"):
        time.sleep(0.02)
    with record_collective("broadcast"):
        pass
    assert 0.02 <= flight_recorder.FLIGHT_RECORDER.collective_s < 1.0
    assert found.heartbeat_file.read().collectives_entered(DEFAULT_GROUP) == 2


def test_a_compiled_graph_records_nothing() -> None:
    before = FLIGHT_RECORDER.collective_s

    @torch.compile(backend="eager", fullgraph=True)
    def doubled(x: torch.Tensor) -> torch.Tensor:
        with record_collective("all_reduce"):
            return x * 2

    assert doubled(torch.ones(2)).tolist() == [2, 2]
    assert FLIGHT_RECORDER.collective_s == before
