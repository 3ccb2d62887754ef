"""Journal: what the hooks of one run tell each other: values of this step, newest, best, notes."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Best:
    """The lowest validation loss so far, and its step."""

    loss: float = math.inf
    step: int = 0


class Journal:
    """Values put here go into the step's row of metrics; notes are said to people once."""

    def __init__(self) -> None:
        self.best = Best()
        self.newest: dict[str, float] = {}
        self.health = ""  # of the routers, in words
        self._values: dict[str, float] = {}
        self._notes: list[str] = []

    def put(self, values: dict[str, float]) -> None:
        self._values |= values
        self.newest |= values

    def note(self, sentence: str) -> None:
        self._notes.append(sentence)

    def take_values(self) -> dict[str, float]:
        """Return what was put since the last call."""
        values, self._values = self._values, {}
        return values

    def take_notes(self) -> list[str]:
        """Return the sentences since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def scored(self, loss: float, *, step: int) -> None:
        """Remember a validation loss if it is the best."""
        if loss < self.best.loss:
            self.best = Best(loss, step)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps (JSON data)."""
        known = math.isfinite(self.best.loss)
        return {"best": {"loss": self.best.loss, "step": self.best.step} if known else None}

    def restore(self, state: dict[str, Any]) -> None:
        self.best = Best(**state["best"]) if state["best"] else Best()
