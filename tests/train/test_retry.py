"""The queue of bad work: once more after a good step, then given up."""

from moesaic.train.retry import Retry, Try


def test_bad_work_waits_for_a_good_step() -> None:
    retry = Retry()
    first = retry.next({"at": 1})
    assert first == Try({"at": 1}, again=False)
    retry.bad(first)
    second = retry.next({"at": 2})
    assert second == Try({"at": 2}, again=False), "after a bad step comes new work"
    retry.bad(second)
    assert retry.in_a_row == 2
    retry.good()
    assert retry.next({"at": 3}) == Try({"at": 1}, again=True), "the oldest comes first"
    assert retry.waiting == [{"at": 2}]


def test_the_second_failure_gives_it_up() -> None:
    retry = Retry([{"at": 1}])
    retry.bad(retry.next({"at": 2}))
    assert retry.waiting == []
    assert retry.in_a_row == 1
