"""Background: an iterator moved to a thread that works a few items ahead."""

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class PrefetchIterator(Generic[T]):
    """Items of ``source`` in order, made up to ``ahead`` early; its errors are raised here.

    The thread is a daemon and ends at ``close()``, which waits for it.
    """

    def __init__(self, source: Iterator[T], *, depth: int) -> None:
        self._source = source
        self._queue: queue.Queue[T | _Failure] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._failure: _Failure | None = None
        self._thread = threading.Thread(target=self._run, name="moesaic-data", daemon=True)
        self._thread.start()

    def __iter__(self) -> "PrefetchIterator[T]":
        return self

    def __next__(self) -> T:
        if self._failure or self._stop.is_set():  # an iterator that has ended stays ended
            raise self._failure.error if self._failure else StopIteration
        item = self._queue.get()
        if isinstance(item, _Failure):
            self._failure = item
            raise item.error
        return item

    def close(self) -> None:
        """End the thread; items made early are lost. May be called twice."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for item in self._source:
                if not self._put(item):
                    return
            self._put(_Failure(StopIteration()))
        except BaseException as error:  # handed to the consumer, whatever it is
            self._put(_Failure(error))

    def _put(self, item: T | _Failure) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.05)
            except queue.Full:
                continue
            return True
        return False
