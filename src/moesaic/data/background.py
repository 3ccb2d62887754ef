"""Background: an iterator moved to a thread that works a few items ahead."""

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class _Failed:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class Background(Generic[T]):
    """Items of ``source`` in order, made up to ``ahead`` early; its errors are raised here.

    The thread is a daemon and ends at ``close()``, which waits for it.
    """

    def __init__(self, source: Iterator[T], *, ahead: int) -> None:
        self._source = source
        self._queue: queue.Queue[T | _Failed] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._failed: _Failed | None = None
        self._thread = threading.Thread(target=self._work, name="moesaic-data", daemon=True)
        self._thread.start()

    def __iter__(self) -> "Background[T]":
        return self

    def __next__(self) -> T:
        if self._failed or self._stop.is_set():  # an iterator that has ended stays ended
            raise self._failed.error if self._failed else StopIteration
        item = self._queue.get()
        if isinstance(item, _Failed):
            self._failed = item
            raise item.error
        return item

    def close(self) -> None:
        """End the thread; items made early are lost. May be called twice."""
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        try:
            for item in self._source:
                if not self._put(item):
                    return
            self._put(_Failed(StopIteration()))
        except BaseException as error:  # handed to the consumer, whatever it is
            self._put(_Failed(error))

    def _put(self, item: T | _Failed) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.05)
            except queue.Full:
                continue
            return True
        return False
