"""Learning-rate schedules: the factor on every learning rate, as a function of the step.

Steps count from 0; ``lr_factor(step, steps=n)`` is the factor of the update of that step. Warm-up
rises from ``1 / warmup`` to 1. A decay reaches ``final`` at step n, one past the last, so that the
last update is small but not zero.
"""

import math
from abc import abstractmethod
from typing import Annotated

from pydantic import Field

from moesaic.core.config import Choice

Steps = Annotated[int, Field(ge=0)]
FractionOfRun = Annotated[float, Field(ge=0, le=1)]


class LRSchedule(Choice):
    """Family of learning-rate schedules."""

    @abstractmethod
    def lr_factor(self, step: int, *, steps: int) -> float:
        """Return the factor for ``step`` of ``steps``; 1 is the full learning rate."""


class DecayShape(Choice):
    """Family of decay shapes: a function from 1 (at 0) to 0 (at 1)."""

    @abstractmethod
    def __call__(self, progress: float) -> float: ...


class LinearDecay(DecayShape):
    """``1 - p``."""

    def __call__(self, progress: float) -> float:
        return 1 - progress


class OneMinusSqrtDecay(DecayShape):
    """``1 - sqrt(p)``: quick at first; the better cool-down in arXiv:2405.18392."""

    def __call__(self, progress: float) -> float:
        return 1 - math.sqrt(progress)


class Constant(LRSchedule):
    """Warm up, then keep the full learning rate."""

    warmup: Steps = 0

    def lr_factor(self, step: int, *, steps: int) -> float:  # noqa: ARG002
        return _warmup_factor(step, self.warmup)


class WSD(LRSchedule):
    """Warm-up, stable, decay: decay over the last share of the run (arXiv:2404.06395, MiniCPM).

    ``decay`` is the share of all steps spent in the decay, ``final`` the factor it ends at.
    """

    warmup: Steps = 100
    decay: FractionOfRun = 0.2
    shape: DecayShape = OneMinusSqrtDecay()
    final: FractionOfRun = 0.0

    def lr_factor(self, step: int, *, steps: int) -> float:
        progress = _decay_progress(step, start=steps * (1 - self.decay), end=steps)
        return _warmup_factor(step, self.warmup) * (
            self.final + (1 - self.final) * self.shape(progress)
        )


class Cosine(LRSchedule):
    """Warm up, then half a cosine down to ``final`` (arXiv:1608.03983)."""

    warmup: Steps = 100
    final: FractionOfRun = 0.1

    def lr_factor(self, step: int, *, steps: int) -> float:
        if step < self.warmup:
            return _warmup_factor(step, self.warmup)
        wave = 0.5 * (1 + math.cos(math.pi * _decay_progress(step, start=self.warmup, end=steps)))
        return self.final + (1 - self.final) * wave


class InverseSqrt(LRSchedule):
    """Warm up, then ``sqrt(warmup / step)``, whatever the length of the run (arXiv:1706.03762)."""

    warmup: Annotated[int, Field(ge=1)] = 4000

    def lr_factor(self, step: int, *, steps: int) -> float:  # noqa: ARG002
        return min(_warmup_factor(step, self.warmup), math.sqrt(self.warmup / (step + 1)))


def _warmup_factor(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def _decay_progress(step: int, *, start: float, end: float) -> float:
    return min(1.0, max(0.0, (step - start) / (end - start))) if end > start else 0.0
