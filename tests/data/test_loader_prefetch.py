"""Prefetching: order, errors of the thread, and the end of the thread."""

import threading

import pytest

from moesaic.data.loader import PrefetchIterator


def failing():
    yield 1
    raise ValueError("broken row")


def test_items_are_in_order_and_iteration_ends():
    ahead = PrefetchIterator(iter(range(50)), depth=3)
    assert list(ahead) == list(range(50))
    assert list(ahead) == []


def test_an_error_of_the_thread_is_raised_in_order_and_again():
    ahead = PrefetchIterator(failing(), depth=4)
    assert next(ahead) == 1
    for _ in range(2):
        with pytest.raises(ValueError, match="broken row"):
            next(ahead)


def test_no_more_than_depth_items_are_prefetched():
    made = []
    ahead = PrefetchIterator((made.append(i) or i for i in range(100)), depth=2)
    for _ in range(5):
        next(ahead)
    ahead.close()
    assert len(made) <= 5 + 2 + 1


def test_closing_ends_a_thread_that_waits_for_the_queue():
    before = threading.active_count()
    ahead = PrefetchIterator(iter(int, 1), depth=1)
    next(ahead)
    ahead.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(ahead)
