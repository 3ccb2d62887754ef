"""Result: what a call of ``train`` ends with."""

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

StopReason = Literal["finished", "until", "SIGINT", "SIGTERM"]


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """How far a run got. ``steps`` and ``tokens`` count from its start, ``seconds`` this call.

    ``metrics`` holds the newest value of every metric. ``stopped`` says why it ended: all steps
    done, the asked-for step reached, or a signal (after which it can be resumed).
    """

    out: Path
    steps: int
    tokens: int
    seconds: float
    metrics: dict[str, float]
    stop_reason: StopReason

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal's number, as a shell would say it."""
        ended = self.stop_reason in ("finished", "until")
        return 0 if ended else 128 + signal.Signals[self.stop_reason].value
