"""Retry: where the data of a step that was not finite begins, kept for one more try.

The data pipeline gives the same batches from the same state, on any number of ranks; so a place in
it is enough to have the batches again, in this process or in one that resumed.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Place = dict[str, Any]  # a loader's state


@dataclass(frozen=True, slots=True)
class Try:
    """A step to make: the place its data begins, and whether it failed once before."""

    place: Place
    again: bool


class Retry:
    """A queue of places. ``in_a_row`` counts bad steps since the last good one."""

    def __init__(self, waiting: Sequence[Place] = ()) -> None:
        self.in_a_row = 0
        self._waiting = deque(waiting)

    @property
    def waiting(self) -> list[Place]:
        """The queue, as a checkpoint keeps it."""
        return list(self._waiting)

    def next(self, place: Place) -> Try:
        """Return the step to make: waiting work after a good step, else new work at ``place``."""
        if self._waiting and not self.in_a_row:
            return Try(self._waiting.popleft(), again=True)
        return Try(place, again=False)

    def good(self) -> None:
        self.in_a_row = 0

    def bad(self, tried: Try) -> None:
        """Keep the place for one more try; the second failure gives it up."""
        self.in_a_row += 1
        if not tried.again:
            self._waiting.append(tried.place)
