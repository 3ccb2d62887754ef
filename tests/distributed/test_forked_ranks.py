"""The rank harness: results in order, failures with their traceback, no hang."""

import os
import time

import pytest
import torch.distributed as distributed

from moesaic.distributed.forked_ranks import RankError, run_cases_on_ranks, run_on_ranks


def test_results_come_in_rank_order() -> None:
    assert run_on_ranks(4, lambda start: start + distributed.get_rank(), 10) == [10, 11, 12, 13]


def _raise_on_one() -> None:
    if distributed.get_rank() == 1:
        raise ValueError("the real reason")
    distributed.barrier()


def test_the_first_failure_is_shown_with_its_traceback() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 failed.*_raise_on_one.*the real reason"):
        run_on_ranks(3, _raise_on_one)


def test_a_rank_that_hangs_ends_in_an_error() -> None:
    with pytest.raises(RankError, match="in time"):
        run_on_ranks(2, time.sleep, 60, timeout_s=0.5)


def test_a_rank_that_dies_is_named() -> None:
    with pytest.raises(RankError, match="rank 0 died with exit code 7"):
        run_on_ranks(2, lambda: os._exit(7) if distributed.get_rank() == 0 else time.sleep(9))


def _case(number: int) -> int:
    if number == 1:
        _raise_on_one()
    if number == 2:
        time.sleep(60)
    return 10 * number + distributed.get_rank()


def test_cases_after_a_failed_or_hung_one_still_run() -> None:
    first, failed, hung, last = run_cases_on_ranks(2, _case, range(4), timeout_s=1.5)
    assert (first, last) == ([0, 1], [30, 31])
    assert "the real reason" in str(failed)
    assert "in time" in str(hung)
