"""Spans: where the seconds of a step go, by name."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Spans:
    """Adds up named spans: ``with spans("data"): ...``. Host time; it does not wait for a GPU."""

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - start

    def take(self) -> dict[str, float]:
        """Return seconds by name since the last call, and start again."""
        seconds, self._seconds = self._seconds, {}
        return seconds
