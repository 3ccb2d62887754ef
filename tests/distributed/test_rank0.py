"""Work on rank 0: its result, its errors, and more time than the timeout of collectives."""

import time

import pytest

from moesaic.core.errors import UserError
from moesaic.distributed import rank0
from moesaic.distributed.forked_ranks import RankError, run_on_ranks
from moesaic.distributed.rank0 import run_on_rank0
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess


def _answer() -> tuple[list[int], list[int]]:
    world, worked = ProcessGroupWorld(), []

    def work() -> list[int]:
        worked.append(world.rank)
        return [1, 2]

    return run_on_rank0(world, work), worked


def test_all_ranks_receive_the_result_of_rank_0() -> None:
    assert run_on_ranks(3, _answer) == [([1, 2], [0]), ([1, 2], []), ([1, 2], [])]
    assert run_on_rank0(SingleProcess(), lambda: "here") == "here"


def _slow() -> str:
    rank0.KEEPALIVE_S = 0.1
    return run_on_rank0(ProcessGroupWorld(), lambda: time.sleep(1.5) or "done")


def test_it_may_take_longer_than_the_collective_timeout() -> None:
    assert run_on_ranks(2, _slow, timeout_s=30, collective_timeout_s=1.0) == ["done", "done"]


def _mistake() -> str:
    def work() -> None:
        raise UserError("no such corpus")

    try:
        run_on_rank0(ProcessGroupWorld(), work)
    except UserError as error:
        return str(error)
    return "nothing"


def test_a_user_error_is_raised_on_every_rank() -> None:
    assert run_on_ranks(2, _mistake) == ["no such corpus"] * 2


def _bug() -> None:
    run_on_rank0(ProcessGroupWorld(), lambda: 1 // 0)


def test_any_other_error_ends_the_run() -> None:
    with pytest.raises(RankError, match="ZeroDivisionError"):
        run_on_ranks(2, _bug)
