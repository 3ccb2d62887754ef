"""Retry queue: a skipped batch is retried once after a good step, then dropped."""

from moesaic.train.bad_steps import RetryQueue, StepAttempt


def test_a_skipped_batch_is_retried_after_the_next_good_step() -> None:
    retry = RetryQueue()
    first = retry.next_attempt({"at": 1})
    assert first == StepAttempt({"at": 1}, is_retry=False)
    retry.mark_failed(first)
    second = retry.next_attempt({"at": 2})
    assert second == StepAttempt({"at": 2}, is_retry=False), "after a bad step comes new work"
    retry.mark_failed(second)
    assert retry.consecutive_failures == 2
    retry.mark_succeeded()
    assert retry.next_attempt({"at": 3}) == StepAttempt({"at": 1}, is_retry=True), (
        "the oldest comes first"
    )
    assert retry.pending == [{"at": 2}]


def test_a_failed_retry_is_dropped() -> None:
    retry = RetryQueue([{"at": 1}])
    retry.mark_failed(retry.next_attempt({"at": 2}))
    assert retry.pending == []
    assert retry.consecutive_failures == 1
