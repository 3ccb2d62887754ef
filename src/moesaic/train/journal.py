"""Journal: what the hooks of one run tell each other: values of this step, newest, best, notes."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class BestValidation:
    """The lowest validation loss so far, and its step."""

    loss: float = math.inf
    step: int = 0


class EventLog:
    """Values put here go into the step's row of metrics; notes are said to people once."""

    def __init__(self) -> None:
        self.best = BestValidation()
        self.latest_values: dict[str, float] = {}
        self.router_health = ""  # of the routers, in words
        self._values: dict[str, float] = {}
        self._notes: list[str] = []

    def record_values(self, values: dict[str, float]) -> None:
        self._values |= values
        self.latest_values |= values

    def add_note(self, sentence: str) -> None:
        self._notes.append(sentence)

    def pop_values(self) -> dict[str, float]:
        """Return what was put since the last call."""
        values, self._values = self._values, {}
        return values

    def pop_notes(self) -> list[str]:
        """Return the sentences since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def record_validation_loss(self, loss: float, *, step: int) -> None:
        """Remember a validation loss if it is the best."""
        if loss < self.best.loss:
            self.best = BestValidation(loss, step)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps (JSON data)."""
        known = math.isfinite(self.best.loss)
        return {"best": {"loss": self.best.loss, "step": self.best.step} if known else None}

    def restore(self, state: dict[str, Any]) -> None:
        self.best = BestValidation(**state["best"]) if state["best"] else BestValidation()
