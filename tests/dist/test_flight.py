"""The recorder: which errors it explains, what it counts, and what it leaves alone."""

import time

import pytest
import torch

from moesaic.dist import flight
from moesaic.dist.flight import FLIGHT, Flight, at, collective
from moesaic.dist.marks import ALL, Book
from moesaic.dist.verdict import LostRankError, Verdict


class Found:
    """A watch that always finds the same."""

    def __init__(self) -> None:
        self.book = Book()
        self.told: list[str] = []
        self.causes: list[str] = []

    def start(self) -> None: ...

    def close(self) -> None: ...

    def fail(self, text: str) -> None:
        self.told.append(text)

    def verdict(self, cause: str) -> Verdict:
        self.causes.append(cause)
        return Verdict("rank 3 is gone", (3,))


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Found:
    watch = Found()
    here = Flight()
    here.open(watch)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(flight, "FLIGHT", here)
    return watch


@pytest.mark.parametrize(
    "words",
    [
        "[gloo/tcp] Timed out waiting 3000ms for recv operation",
        "Connection closed by peer [127.0.0.1]:4321",
        "Gloo connectFullMesh failed with Connection refused",
        "NCCL error: remote process exited or there was a network error",
    ],
)
def test_an_error_about_a_lost_rank_names_it(found: Found, words: str) -> None:
    at("forward", step=2)
    with pytest.raises(LostRankError, match="rank 3 is gone") as caught, collective("all_reduce"):
        raise RuntimeError(f"{words}\nand more")
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert found.causes == [words]
    assert found.book.read().inside, "the others must see where this rank waited"


def test_an_error_of_the_caller_stays_its_own(found: Found) -> None:
    with pytest.raises(RuntimeError, match="shape"), collective("all_reduce"):
        raise RuntimeError("shape [2] does not match [3]")
    with pytest.raises(KeyError), collective("all_reduce"):
        raise KeyError("timeout")
    assert found.causes == []


def test_without_a_group_of_ours_no_error_is_changed() -> None:
    with pytest.raises(RuntimeError, match="Timed out"), collective("all_reduce"):
        raise RuntimeError("Timed out")


def test_the_others_are_told_why_a_rank_ends(found: Found) -> None:
    error = ValueError("no")
    assert flight.FLIGHT.failed(error) is error
    assert found.told == ["ValueError: no"]
    lost = flight.FLIGHT.failed(RuntimeError("Connection reset by peer"))
    assert isinstance(lost, LostRankError)
    assert found.told == ["ValueError: no"], "one that lost its peers is no cause"


def test_time_in_collectives_is_counted(found: Found) -> None:
    with collective("all_reduce"):
        time.sleep(0.02)
    with collective("broadcast"):
        pass
    assert 0.02 <= flight.FLIGHT.waited_s < 1.0
    assert found.book.read().came_to(ALL) == 2


def test_a_compiled_graph_notes_nothing() -> None:
    before = FLIGHT.waited_s

    @torch.compile(backend="eager", fullgraph=True)
    def doubled(x: torch.Tensor) -> torch.Tensor:
        with collective("all_reduce"):
            return x * 2

    assert doubled(torch.ones(2)).tolist() == [2, 2]
    assert FLIGHT.waited_s == before
