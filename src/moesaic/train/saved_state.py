"""The host state of a run in ``state.json`` of a checkpoint, checked before training goes on."""

import json
import math
from typing import Any, ClassVar

from pydantic import Field

from moesaic.checkpoint.full_checkpoint import STATE_KIND
from moesaic.checkpoint.snapshot import RankSnapshot, Snapshot
from moesaic.core.file_reader import MAX_INT, FileKind, FileShape, parse_shape
from moesaic.train.bad_steps import LossHistory
from moesaic.train.running_metrics import BestValidation

PREVIOUS_NAMES = {"journal": "events"}  # of fields in checkpoints of earlier versions


class _SpikesShape(FileShape):
    recent: tuple[float, ...] = ()
    in_a_row: int = Field(default=0, ge=0, le=MAX_INT)
    rate: float = Field(default=1.0, gt=0, le=1)


class _BestShape(FileShape):
    loss: float
    step: int = Field(ge=0, le=MAX_INT)


class _EventsShape(FileShape):
    best: _BestShape | None


class SavedState(FileShape):
    """The fields of state.json. ``data`` and ``retry`` are loader states, which a loader checks."""

    kind: ClassVar[FileKind] = STATE_KIND
    config: dict[str, Any]
    data: dict[str, Any]
    retry: tuple[dict[str, Any], ...]
    spikes: _SpikesShape = _SpikesShape()  # absent in checkpoints of earlier versions
    events: _EventsShape

    @property
    def loss_history(self) -> LossHistory:
        """State of the spike policy."""
        return LossHistory.from_dict(dict(self.spikes))

    @property
    def best(self) -> BestValidation:
        """The lowest validation loss so far; infinite without one."""
        found = self.events.best
        return BestValidation(math.inf) if found is None else BestValidation(found.loss, found.step)


def check_saved_state(snapshot: Snapshot | RankSnapshot) -> SavedState:
    """Return the state of a snapshot. Raises CheckpointError that names each wrong field."""
    named = {PREVIOUS_NAMES.get(name, name): value for name, value in snapshot.state.items()}
    where = f"the state of step {snapshot.step}"
    return parse_shape(json.dumps(named).encode(), SavedState, kind=STATE_KIND, where=where)
