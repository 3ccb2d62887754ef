"""Running metrics: loss sums between two rows of metrics, and the event log of a run.

Sums stay on the device and are read only when a row is written. They are part of a checkpoint, so a
resumed run reports the same values as an uninterrupted one. Loss categories are the run's tasks,
then its languages (a row counts for its target language). Letters: B rows, C categories, N
predicted tokens.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from moesaic.core.errors import CheckpointError
from moesaic.core.file_reader import MIB, Count, FileKind, FileShape, parse_shape
from moesaic.core.shapes import Float, Int, Tensor
from moesaic.data.batch import TARGET_LANGUAGE, TASK, Batch
from moesaic.distributed.world import World


@dataclass(frozen=True, slots=True)
class BestValidation:
    """Lowest validation loss so far, and its step."""

    loss: float = math.inf
    step: int = 0


class EventLog:
    """What hooks of a run share: values for the next row of metrics, notes to print, best loss."""

    def __init__(self) -> None:
        self.best = BestValidation()
        self.latest_values: dict[str, float] = {}
        self.router_health = ""  # one sentence
        self._values: dict[str, float] = {}
        self._notes: list[str] = []

    def record_values(self, values: dict[str, float]) -> None:
        self._values |= values
        self.latest_values |= values

    def add_note(self, sentence: str) -> None:
        self._notes.append(sentence)

    def pop_values(self) -> dict[str, float]:
        """Return the values recorded since the last call."""
        values, self._values = self._values, {}
        return values

    def pop_notes(self) -> list[str]:
        """Return the notes added since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def record_validation_loss(self, loss: float, *, step: int) -> None:
        """Update ``best`` if the loss is lower."""
        if loss < self.best.loss:
            self.best = BestValidation(loss, step)

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint (JSON data)."""
        return {"best": asdict(self.best) if math.isfinite(self.best.loss) else None}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what ``state`` returned. Raises CheckpointError for a value out of range."""
        data = json.dumps(state).encode()
        shape = parse_shape(data, _EventsShape, kind=_EventsShape.kind, where="the saved events")
        best = shape.best
        self.best = BestValidation(best.loss, best.step) if best else BestValidation()


class _BestShape(FileShape):
    loss: float
    step: Count


class _EventsShape(FileShape):
    kind: ClassVar[FileKind] = FileKind(name="event log", max_bytes=MIB, error=CheckpointError)
    best: _BestShape | None


@dataclass(frozen=True, slots=True)
class LossCategories:
    """Names under which losses are reported: tasks, then target languages."""

    tasks: tuple[str, ...]
    languages: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return self.tasks + self.languages

    def sums(
        self, loss: Float[Tensor, "N"], *, row: Int[Tensor, "N"], batch: Batch
    ) -> Float[Tensor, "2 C"]:
        """Return per category the summed loss and the number of predicted tokens (float64).

        ``row`` is each token's row of the batch. Summed by rows first: no atomics, so the same bits
        each time on any device.
        """
        row, order = row.sort(stable=True)
        every = torch.arange(batch.rows, device=row.device)
        ends = torch.searchsorted(row, every, right=True)
        lengths = ends.diff(prepend=ends.new_zeros(1))
        loss = loss[order]
        # unsafe leaves out checks of the lengths, which wait for a GPU and refuse an empty batch
        rows = torch.segment_reduce(loss.detach().double(), "sum", lengths=lengths, unsafe=True)
        member = torch.zeros(batch.rows, len(self.names), dtype=torch.float64, device=loss.device)
        member.scatter_(1, batch.groups[TASK][:, None], 1.0)
        target_language = batch.groups[TARGET_LANGUAGE]
        member.scatter_(1, target_language[:, None] + len(self.tasks), 1.0)
        return torch.stack([rows, lengths.double()]) @ member


@dataclass(frozen=True, slots=True)
class StepSums:
    """Sums of one step (or micro-batch) on this rank.

    ``losses`` is ``[negative log-likelihood, predicted tokens] x category``; ``terms`` are this
    rank's shares of the parts of the training loss by name (``objective`` is their sum);
    ``tokens`` counts real tokens of both sides.
    """

    losses: Float[Tensor, "2 C"]
    terms: dict[str, Float[Tensor, ""]]
    tokens: int

    def add(self, other: "StepSums") -> "StepSums":
        terms = {name: value + other.terms[name] for name, value in self.terms.items()}
        return StepSums(self.losses + other.losses, terms, self.tokens + other.tokens)


class RunningMetrics:
    """Sums over the steps since the last row of metrics."""

    def __init__(self, categories: LossCategories, *, device: torch.device) -> None:
        self.categories = categories
        self.device = device
        self.skipped = 0
        self._total = 0.0
        self._reset()

    def _reset(self) -> None:
        self._steps, self._norm, self._tokens = 0, 0.0, 0
        columns = len(self.categories.names)
        self._losses = torch.zeros(2, columns, dtype=torch.float64, device=self.device)
        self._terms: dict[str, Tensor] = {}

    def add_step(self, sums: StepSums, *, norm: float) -> None:
        """Add one step; ``norm`` is the gradient norm before clipping."""
        self._steps += 1
        self._norm += norm
        self._tokens += sums.tokens
        self._losses += sums.losses
        for name, value in sums.terms.items():
            self._terms[name] = self._terms.get(name, 0.0) + value

    def add_losses(self, losses: Float[Tensor, "2 C"]) -> None:
        """Add losses alone (validation)."""
        self._losses += losses

    def compute_and_reset(self, world: World) -> dict[str, float]:
        """Return the means since the last call, over all ranks, and reset. Collective.

        ``tokens`` counts tokens since the last call, ``train/tokens`` since step 0.
        """
        row = self.mean_losses(world, prefix="train")
        terms = world.all_reduce_floats({name: float(value) for name, value in self._terms.items()})
        new = self.total_tokens(world) - self._total
        self._total += new
        steps = max(self._steps, 1)
        row |= {f"train/{name}": value / steps for name, value in terms.items()}
        row |= {"train/grad_norm": self._norm / steps, "train/skipped": float(self.skipped)}
        row |= {"train/tokens": self._total, "tokens": new}
        self._reset()
        return row

    def mean_losses(self, world: World, *, prefix: str) -> dict[str, float]:
        """Return ``prefix/loss`` and ``prefix/loss/<category>`` where any token was predicted."""
        total, count = world.all_reduce(self._losses).tolist()
        tasks = len(self.categories.tasks)
        row = {f"{prefix}/loss": sum(total[:tasks]) / sum(count[:tasks])} if sum(count) else {}
        for index, name in enumerate(self.categories.names):
            if count[index]:
                row[f"{prefix}/loss/{name}"] = total[index] / count[index]
        return row

    def total_tokens(self, world: World) -> float:
        """Return the number of non-padding tokens of both sides since step 0. Collective."""
        return self._total + world.all_reduce_floats({"tokens": self._tokens})["tokens"]

    def tensors(self, world: World) -> dict[str, Tensor]:
        """Return the sums over all ranks by name, for a checkpoint. Collective."""
        local = {"tokens": torch.tensor(float(self._tokens)), "losses": self._losses}
        local |= {f"term/{name}": value for name, value in self._terms.items()}
        # Equal on all ranks, so not summed.
        same = torch.tensor(
            [self._steps, self._norm, self.skipped, self._total], dtype=torch.float64
        )
        return {"replicated": same} | {
            name: world.all_reduce(value.double()) for name, value in local.items()
        }

    def restore(self, tensors: Mapping[str, Tensor], *, world: World) -> None:
        """Restore the result of ``tensors``: rank 0 takes the sums, the others start from zero."""
        share = 1.0 if world.rank == 0 else 0.0
        steps, self._norm, skipped, self._total = tensors["replicated"].tolist()
        self._steps, self.skipped = int(steps), int(skipped)
        self._tokens = int(tensors["tokens"] * share)
        self._losses = tensors["losses"].to(self.device) * share
        named = {name.partition("/")[2]: t for name, t in tensors.items() if "/" in name}
        self._terms = {name: value.to(self.device) * share for name, value in named.items()}
