"""A line for each test set that was scored, with the time that the others will take."""

import time
from collections.abc import Sequence

from moesaic.cli.deferred_imports import deferred
from moesaic.cli.shared_options import show_progress

with deferred():
    from moesaic.core.units import show_seconds
    from moesaic.evaluate.test_set_result import TestSetResult
    from moesaic.evaluate.testset import TestSet


class ScoreProgress:
    """Prints progress on stderr. The time left is by the strings scored each second so far."""

    def __init__(self, tests: Sequence[TestSet]) -> None:
        self._strings = sum(map(len, tests))
        self._done = 0
        self._started = time.monotonic()
        languages = f"{len(tests)} test sets" if len(tests) > 1 else "one test set"
        show_progress(f"scoring {self._strings:,} strings in {languages}")

    def __call__(self, test: TestSet, _: TestSetResult) -> None:
        self._done += len(test)
        left = self.seconds_left(time.monotonic() - self._started)
        more = f", about {show_seconds(left)} left" if left else ""
        show_progress(f"scored {test.key} ({len(test):,}){more}")

    def seconds_left(self, spent: float) -> float:
        """Return the seconds that the strings not yet scored will take, after ``spent`` seconds."""
        return spent * (self._strings - self._done) / max(1, self._done)
