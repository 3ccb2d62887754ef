"""Retry: where the data of a step that was not finite begins, kept for one more try.

The data pipeline gives the same batches from the same state, on any number of ranks; so a place in
it is enough to have the batches again, in this process or in one that resumed.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LoaderState = dict[str, Any]  # a loader's state


@dataclass(frozen=True, slots=True)
class StepAttempt:
    """A step to make: the place its data begins, and whether it failed once before."""

    loader_state: LoaderState
    is_retry: bool


class RetryQueue:
    """A queue of places. ``in_a_row`` counts bad steps since the last good one."""

    def __init__(self, pending: Sequence[LoaderState] = ()) -> None:
        self.consecutive_failures = 0
        self._pending = deque(pending)

    @property
    def pending(self) -> list[LoaderState]:
        """The queue, as a checkpoint keeps it."""
        return list(self._pending)

    def next_attempt(self, loader_state: LoaderState) -> StepAttempt:
        """Return the step to make: waiting work after a good step, else new work at ``place``."""
        if self._pending and not self.consecutive_failures:
            return StepAttempt(self._pending.popleft(), is_retry=True)
        return StepAttempt(loader_state, is_retry=False)

    def mark_succeeded(self) -> None:
        self.consecutive_failures = 0

    def mark_failed(self, attempt: StepAttempt) -> None:
        """Keep the place for one more try; the second failure gives it up."""
        self.consecutive_failures += 1
        if not attempt.is_retry:
            self._pending.append(attempt.loader_state)
