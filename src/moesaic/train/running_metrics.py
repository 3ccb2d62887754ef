"""Running metrics: loss sums between two rows of metrics, and the event log of a run.

Sums stay on the device and are read only when a row is written. They are part of a checkpoint, so a
resumed run reports the same values as an uninterrupted one. Loss categories are the labels of the
rows, group by group: tasks, target languages, and any others that the data has. Letters: B rows, C
categories, K values of a prediction (the loss first), N predictions.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from moesaic.core.errors import CheckpointError
from moesaic.core.file_reader import MIB, Count, FileKind, FileShape, parse_shape
from moesaic.core.shapes import Float, Int, Tensor
from moesaic.data.batch import SOURCE_LANGUAGE, TARGET_LANGUAGE, TASK, Batch
from moesaic.distributed.world import World

ALL_ROWS = "all"  # the category of rows without labels


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


@dataclass(frozen=True)
class LossCategories:
    """Names under which losses are reported: the labels of rows by group (``Batch.groups``).

    Every row has a label of the first group; without groups all rows are one category. A source
    language is no category: a row counts for its target language.
    """

    labels: Mapping[str, tuple[str, ...]]

    @staticmethod
    def of(labels: Mapping[str, Sequence[str]]) -> "LossCategories":
        """Return the categories of data with these labels."""
        return LossCategories({group: tuple(values) for group, values in labels.items()})

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """The groups whose labels are categories."""
        return tuple(group for group in self.labels if group != SOURCE_LANGUAGE)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the categories: a task, a language, or GROUP/LABEL of another group."""
        return tuple(
            label if group in (TASK, TARGET_LANGUAGE) else f"{group}/{label}"
            for group in self.groups
            for label in self.labels[group]
        ) or (ALL_ROWS,)

    @property
    def partition(self) -> slice:
        """The categories of the first group, of which every row has one."""
        return slice(0, len(self.labels[self.groups[0]]) if self.groups else 1)

    def routing_group(self, side: str) -> str | None:
        """Return the group by which experts are counted in a stack; None: rows have no labels.

        It is the language that the stack reads or writes, or else the last group of the data.
        """
        language = SOURCE_LANGUAGE if side == "encoder" else TARGET_LANGUAGE
        return language if language in self.labels else next(reversed(self.groups), None)

    @property
    def routing_labels(self) -> tuple[str, ...]:
        """The names of the labels by which experts are counted."""
        group = self.routing_group("decoder")
        return (ALL_ROWS,) if group is None else self.labels[group]

    def rows_for_routing(self, batch: Batch, *, side: str) -> Int[Tensor, "B"]:
        """Return the number of each row's label among ``routing_labels``."""
        group = self.routing_group(side)
        return torch.zeros_like(batch.key) if group is None else batch.groups[group]

    def sums(
        self, values: Float[Tensor, "K N"], *, row: Int[Tensor, "N"], batch: Batch
    ) -> Float[Tensor, "K+1 C"]:
        """Return per category the summed values and the number of predictions (float64).

        ``row`` is each prediction's row of the batch. Summed by rows first: no atomics, so the same
        bits each time on any device. A negative label is of no category.
        """
        row, order = row.sort(stable=True)
        every = torch.arange(batch.rows, device=row.device)
        ends = torch.searchsorted(row, every, right=True)
        lengths = ends.diff(prepend=ends.new_zeros(1))
        # unsafe leaves out checks of the lengths, which wait for a GPU and refuse an empty batch
        rows = [
            torch.segment_reduce(each.detach().double(), "sum", lengths=lengths, unsafe=True)
            for each in values[:, order]
        ]
        return torch.stack([*rows, lengths.double()]) @ self._membership(batch)

    def _membership(self, batch: Batch) -> Float[Tensor, "B C"]:
        member = torch.zeros(batch.rows, len(self.names), dtype=torch.float64, device=batch.device)
        if not self.groups:
            return member + 1
        first = 0
        for group in self.groups:
            label = batch.groups[group][:, None]
            column = label.clamp(min=0) + first
            member.scatter_add_(1, column, (label >= 0).double())
            first += len(self.labels[group])
        return member


@dataclass(frozen=True, slots=True)
class StepSums:
    """Sums of one step (or micro-batch) on this rank.

    ``losses`` is ``[loss, predictions] x category``; ``terms`` are this
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
    """Sums over the steps since the last row of metrics.

    ``values`` names what is summed of each prediction: its loss, in validation the metrics too.
    """

    def __init__(
        self,
        categories: LossCategories,
        *,
        device: torch.device,
        values: Sequence[str] = ("loss",),
    ) -> None:
        self.categories, self.values = categories, tuple(values)
        self.device = device
        self.skipped = 0
        self._total = 0.0
        self._reset()

    def _reset(self) -> None:
        self._steps, self._norm, self._tokens = 0, 0.0, 0
        columns = len(self.categories.names)
        rows = len(self.values) + 1
        self._losses = torch.zeros(rows, columns, dtype=torch.float64, device=self.device)
        self._terms: dict[str, Tensor] = {}

    def add_step(self, sums: StepSums, *, norm: float) -> None:
        """Add one step; ``norm`` is the gradient norm before clipping."""
        self._steps += 1
        self._norm += norm
        self._tokens += sums.tokens
        self._losses += sums.losses
        for name, value in sums.terms.items():
            self._terms[name] = self._terms.get(name, 0.0) + value

    def discard_attempt(self) -> None:
        """Count a skipped attempt: sums are of whole steps."""
        self.skipped += 1

    def add_losses(self, losses: Float[Tensor, "K+1 C"]) -> None:
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
        """Return ``prefix/loss`` and ``prefix/loss/<category>`` where anything was predicted.

        The same of the other values.
        """
        *totals, count = world.all_reduce(self._losses).tolist()
        row: dict[str, float] = {}
        for value, total in zip(self.values, totals, strict=True):
            row |= self._means(f"{prefix}/{value}", total=total, count=count)
        return row

    def _means(self, name: str, *, total: list[float], count: list[float]) -> dict[str, float]:
        whole = self.categories.partition
        row = {name: sum(total[whole]) / sum(count[whole])} if sum(count) else {}
        for index, category in enumerate(self.categories.names):
            if count[index] and category != ALL_ROWS:
                row[f"{name}/{category}"] = total[index] / count[index]
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
