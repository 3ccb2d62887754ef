"""Learning-rate schedules: the factor on every learning rate, as a function of the step.

Steps count from 0; ``lr_factor(step, steps=n)`` is the factor of the update of that step. Warm-up
rises from ``1 / warmup`` in the first step to 1 in step ``warmup``: no update has a rate of zero.
The schedules of transformers count the same curve from 0, one step later. A decay reaches ``final``
at step n, one past the last, so that the last update is small but not zero.

A warm-up is a whole number of steps, or a share of the run below 1 (0.05), which scales with
``steps``. A decay is a share up to 1, or a whole number of steps above 1.
"""

import math
from abc import abstractmethod
from typing import Annotated

from pydantic import AfterValidator, Field

from moesaic.core.config import Choice


def _steps_or_share(value: float) -> float:
    if isinstance(value, int) or 0 <= value < 1:
        return value
    raise ValueError(f"a whole number of steps, or a share of the run below 1, not {value}")


def _share_or_steps(value: float) -> float:
    if 0 <= value <= 1:
        return float(value)
    if isinstance(value, int):
        return value
    raise ValueError(f"a share of the run up to 1, or a whole number of steps above 1, not {value}")


Warmup = Annotated[int | float, Field(ge=0), AfterValidator(_steps_or_share)]
Decay = Annotated[int | float, Field(ge=0), AfterValidator(_share_or_steps)]
FractionOfRun = Annotated[float, Field(ge=0, le=1)]


def warmup_steps(warmup: float, *, steps: int) -> int:
    """Return the steps of a warm-up; a share is rounded down (below one step: none)."""
    return warmup if isinstance(warmup, int) else math.floor(warmup * steps + 1e-9)


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


class CosineDecay(DecayShape):
    """``(1 + cos(pi p)) / 2``: slow at both ends."""

    def __call__(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))


class Constant(LRSchedule):
    """Warm up, then keep the full learning rate."""

    warmup: Warmup = 0

    def lr_factor(self, step: int, *, steps: int) -> float:
        return _warmup_factor(step, warmup_steps(self.warmup, steps=steps))


class WSD(LRSchedule):
    """Warm-up, stable, decay: decay over the last share of the run (arXiv:2404.06395, MiniCPM).

    ``decay`` is what of the run is spent in the decay, ``final`` the factor it ends at.
    """

    warmup: Warmup = 0.02
    decay: Decay = 0.2
    shape: DecayShape = OneMinusSqrtDecay()
    final: FractionOfRun = 0.0

    def lr_factor(self, step: int, *, steps: int) -> float:
        progress = _decay_progress(step, start=self.decay_start(steps), end=steps)
        return _warmup_factor(step, warmup_steps(self.warmup, steps=steps)) * (
            self.final + (1 - self.final) * self.shape(progress)
        )

    def decay_start(self, steps: int) -> float:
        """Return the step at which the decay begins."""
        if isinstance(self.decay, int):
            return max(0, steps - self.decay)
        return steps * (1 - self.decay)


class Cosine(LRSchedule):
    """Warm up, then half a cosine down to ``final`` (arXiv:1608.03983)."""

    warmup: Warmup = 0.02
    final: FractionOfRun = 0.1

    def lr_factor(self, step: int, *, steps: int) -> float:
        warmup = warmup_steps(self.warmup, steps=steps)
        if step < warmup:
            return _warmup_factor(step, warmup)
        wave = CosineDecay()(_decay_progress(step, start=warmup, end=steps))
        return self.final + (1 - self.final) * wave


class InverseSqrt(LRSchedule):
    """Warm up, then ``sqrt(warmup / (step + 1))`` with steps from 0 (arXiv:1706.03762).

    The paper's warm-up is 4,000 of 100,000 steps. With a number of steps the factor does not depend
    on the length of the run. transformers' schedule is one step later.
    """

    warmup: Annotated[Warmup, Field(gt=0)] = 0.04

    def lr_factor(self, step: int, *, steps: int) -> float:
        warmup = max(1, warmup_steps(self.warmup, steps=steps))
        return min(_warmup_factor(step, warmup), math.sqrt(warmup / (step + 1)))


def _warmup_factor(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def _decay_progress(step: int, *, start: float, end: float) -> float:
    return min(1.0, max(0.0, (step - start) / (end - start))) if end > start else 0.0
