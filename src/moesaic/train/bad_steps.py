"""Bad steps: skip a training step with a non-finite loss or a loss spike, and retry its batch once.

``RetryQueue`` holds loader states. The data pipeline yields the same batches from the same state on
any number of ranks, so a state is enough to load the batches again, also after a restart.

``SpikePolicy`` decides what counts as a loss spike. The Ling team (arXiv:2503.05139) skip such a
step, train on its samples later, and lower the learning rate when spikes persist. The criterion and
the default values are ours. A policy receives the loss over all ranks, so all ranks
decide the same.
"""

import json
import math
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Annotated, Any, ClassVar

from pydantic import Field

from moesaic.core.config import Choice
from moesaic.core.errors import CheckpointError
from moesaic.core.file_reader import MAX_INT, MIB, FileKind, FileShape, parse_shape

LoaderState = dict[str, Any]
MAD_TO_DEVIATION = 1.4826  # median absolute deviation to standard deviation, for a normal
MIN_RELATIVE_DEVIATION = 0.01  # of the median loss: almost constant losses have no spikes


@dataclass(frozen=True, slots=True)
class StepAttempt:
    """One attempt at a step: the loader state before its batches, and whether it is a retry."""

    loader_state: LoaderState
    is_retry: bool


class RetryQueue:
    """Loader states of skipped steps, to be tried once more after the next good step."""

    def __init__(self, pending: Sequence[LoaderState] = ()) -> None:
        self.consecutive_failures = 0
        self._pending = deque(pending)

    @property
    def pending(self) -> list[LoaderState]:
        """The queue as a checkpoint stores it."""
        return list(self._pending)

    def next_attempt(self, loader_state: LoaderState) -> StepAttempt:
        """Return a pending retry after a good step, otherwise new data from ``loader_state``."""
        if self._pending and not self.consecutive_failures:
            return StepAttempt(self._pending.popleft(), is_retry=True)
        return StepAttempt(loader_state, is_retry=False)

    def mark_succeeded(self) -> None:
        self.consecutive_failures = 0

    def mark_failed(self, attempt: StepAttempt) -> None:
        """Queue the attempt for one retry; a failed retry is dropped."""
        self.consecutive_failures += 1
        if not attempt.is_retry:
            self._pending.append(attempt.loader_state)


@dataclass(frozen=True, slots=True)
class LossHistory:
    """State of a spike policy: losses of recent good steps (oldest first), consecutive spikes.

    ``rate`` multiplies every learning rate.
    """

    recent: tuple[float, ...] = ()
    in_a_row: int = 0
    rate: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"recent": list(self.recent)}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "LossHistory":
        """Return the history of a checkpoint. Raises CheckpointError for a value out of range."""
        data, kind = json.dumps(value).encode(), _LossHistoryShape.kind
        shape = parse_shape(data, _LossHistoryShape, kind=kind, where="the saved losses")
        return cls(tuple(shape.recent), shape.in_a_row, shape.rate)


class _LossHistoryShape(FileShape):
    kind: ClassVar[FileKind] = FileKind(
        name="history of losses", max_bytes=MIB, error=CheckpointError
    )
    recent: list[float] = Field(default_factory=list)
    in_a_row: int = Field(0, ge=0, le=MAX_INT)
    rate: float = Field(1.0, gt=0, le=1)


@dataclass(frozen=True, slots=True)
class SpikeDecision:
    """Whether the step is skipped, the new history, and the note for the log."""

    history: LossHistory
    skip: bool = False
    note: str = ""


class SpikePolicy(Choice):
    """Loss-spike policy: what counts as a spike, and what follows."""

    @property
    @abstractmethod
    def needs_loss(self) -> bool:
        """Whether the loss is needed before each update, which costs one small collective."""

    @abstractmethod
    def decide(self, loss: float, *, history: LossHistory) -> SpikeDecision:
        """Decide about a step by its finite ``loss`` per token, over all ranks."""


class IgnoreSpikes(SpikePolicy):
    """Every finite step updates the weights; gradient clipping alone bounds its effect."""

    @property
    def needs_loss(self) -> bool:
        return False

    def decide(self, loss: float, *, history: LossHistory) -> SpikeDecision:  # noqa: ARG002
        return SpikeDecision(history)


class SkipSpikes(SpikePolicy):
    """Skip a step whose loss is more than ``factor`` deviations above the median of ``window``.

    The batch is retried once after a good step. After ``patience`` spikes in a row the cause is the
    model, not the batches: all learning rates are multiplied by ``lr_factor`` for the rest of the
    run, and the history starts again. The deviation is estimated from the median absolute
    deviation, so that earlier spikes do not hide later ones.
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
        reason = f"the loss of {loss:.4g} is a spike (over {limit:.4g})"
        if history.in_a_row + 1 < self.patience:
            return SpikeDecision(
                replace(history, in_a_row=history.in_a_row + 1), skip=True, note=reason
            )
        rate = history.rate * self.lr_factor
        note = (
            f"{reason}, {self.patience} in a row: from here on learning rates are {rate:.3g} "
            "of their schedule"
        )
        return SpikeDecision(LossHistory(rate=rate), skip=True, note=note)

    def loss_limit(self, recent: tuple[float, ...]) -> float:
        """Return the largest loss that is not a spike; infinite for a history that is too short."""
        if len(recent) < self.window // 2:
            return math.inf
        center = median(recent)
        deviation = MAD_TO_DEVIATION * median(abs(loss - center) for loss in recent)
        return center + self.factor * max(deviation, MIN_RELATIVE_DEVIATION * abs(center))
