"""Retry: where the data of a step that was not finite begins, kept for one more try.

The data pipeline gives the same batches from the same state, on any number of ranks; so a place in
it is enough to have the batches again, in this process or in one that resumed.

Spikes: what is done with a step whose loss is far above those before it.

The Ling team (arXiv:2503.05139) skip such a step, put its samples in again later, and lower the
learning rate where spikes go on. What counts as one, and every number here, is ours. A rule sees
the loss over all ranks, so it decides alike on each of them.
"""

import math
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Annotated, Any

from pydantic import Field

from moesaic.core.config import Choice

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


MAD_TO_DEVIATION = 1.4826  # of a normal distribution


MIN_RELATIVE_DEVIATION = (
    0.01  # of the usual loss: losses that hardly vary make no spike of a ripple
)


@dataclass(frozen=True, slots=True)
class LossHistory:
    """What a rule remembers between steps: recent losses, spikes in a row, and the rate's factor.

    ``recent`` holds losses of good steps, oldest first; ``rate`` multiplies every learning rate.
    """

    recent: tuple[float, ...] = ()
    in_a_row: int = 0
    rate: float = 1.0

    def plain(self) -> dict[str, Any]:
        """Return JSON data, for a checkpoint."""
        return asdict(self) | {"recent": list(self.recent)}

    @classmethod
    def from_plain(cls, value: dict[str, Any]) -> "LossHistory":
        return cls(**{**value, "recent": tuple(value["recent"])})


@dataclass(frozen=True, slots=True)
class SpikeDecision:
    """Whether the step is skipped, what to remember, and what to say about it."""

    history: LossHistory
    skip: bool = False
    note: str = ""


class SpikePolicy(Choice):
    """Family: what counts as a spike of the loss, and what follows."""

    @property
    @abstractmethod
    def needs_loss(self) -> bool:
        """Whether the loss must be known before each update, which costs one small collective."""

    @abstractmethod
    def decide(self, loss: float, *, history: LossHistory) -> SpikeDecision:
        """Judge a step by its finite ``loss`` per token, over all ranks."""


class IgnoreSpikes(SpikePolicy):
    """Every finite step is taken: clipping alone bounds what one batch can do."""

    @property
    def needs_loss(self) -> bool:
        return False

    def decide(self, loss: float, *, history: LossHistory) -> SpikeDecision:  # noqa: ARG002
        return SpikeDecision(history)


class SkipSpikes(SpikePolicy):
    """Skip a step whose loss is more than ``factor`` deviations above the median of ``window``.

    Its batch comes once more after a good step and is given up if it is a spike again
    (``train/bad_steps.py``). After ``patience`` spikes in a
    row it is the model and not the batches: the rates are lowered by ``lower``, for good, and the
    rule begins to learn anew what is usual. Deviations are those of a normal distribution, from
    the median distance to the median, so that earlier spikes do not hide later ones.
    """

    window: Annotated[int, Field(ge=8)] = 64
    factor: Annotated[float, Field(gt=1)] = 8.0
    patience: Annotated[int, Field(ge=2)] = 4
    lr_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5

    @property
    def needs_loss(self) -> bool:
        return True

    def decide(self, loss: float, *, history: LossHistory) -> SpikeDecision:
        limit = self.loss_limit(history.recent)
        if loss <= limit:
            recent = (*history.recent, loss)[-self.window :]
            return SpikeDecision(replace(history, recent=recent, in_a_row=0))
        said = f"the loss of {loss:.4g} is a spike (over {limit:.4g})"
        if history.in_a_row + 1 < self.patience:
            return SpikeDecision(
                replace(history, in_a_row=history.in_a_row + 1), skip=True, note=said
            )
        rate = history.rate * self.lr_factor
        note = (
            f"{said} and makes {self.patience} in a row: from here on learning rates are {rate:.3g} "
            "of their schedule"
        )
        return SpikeDecision(LossHistory(rate=rate), skip=True, note=note)

    def loss_limit(self, recent: tuple[float, ...]) -> float:
        """Return the largest loss that is no spike; infinite while there are too few before it."""
        if len(recent) < self.window // 2:
            return math.inf
        usual = median(recent)
        spread = MAD_TO_DEVIATION * median(abs(loss - usual) for loss in recent)
        return usual + self.factor * max(spread, MIN_RELATIVE_DEVIATION * abs(usual))
