"""Synthetic batches of rows of uneven lengths, for a run without a corpus.

The n-th batch is a function of n. Its rows are sharded round-robin over the data-parallel ranks, so
some ranks have more tokens than others; every third batch has fewer rows than a large plan has
ranks, and some rows have no token at all. Values and labels are of the kinds that the model's input
and head read. Letters: B rows, S source length, L target length.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moesaic.data.batch import (
    IGNORE_LABEL,
    SOURCE_LANGUAGE,
    TARGET_LANGUAGE,
    TASK,
    Batch,
    InputRows,
)
from moesaic.model.config import ModelConfig
from moesaic.model.head import POINT_LABELS, ROW_LABELS, TOKEN_LABELS, LabelKind

VOCABULARY = 64
TASKS = ("one", "other")
LANGUAGES = ("aaa", "bbb", "ccc")
LABELS = {TASK: TASKS, SOURCE_LANGUAGE: LANGUAGES, TARGET_LANGUAGE: LANGUAGES}
FIRST_ID = 5


@dataclass(frozen=True, slots=True)
class SyntheticShape:
    """``rows`` of at most ``length`` tokens; ``source``: whether there is an encoder input.

    ``value_shape`` is that of a token's value, () for an id; ``rows_per_label`` follow each other
    on one rank.
    """

    rows: int = 10
    length: int = 11
    source: bool = True
    value_shape: tuple[int, ...] = ()
    labels: LabelKind = TOKEN_LABELS
    rows_per_label: int = 1

    @classmethod
    def of_model(cls, model: ModelConfig) -> "SyntheticShape":
        """Return the shape of the batches that a model can be trained on."""
        return cls(
            source=model.encoder.layers > 0,
            value_shape=model.input.value_shape,
            labels=model.head.label_kind,
            rows_per_label=model.head.rows_per_label,
        )


class SyntheticBatches(ABC):
    """An endless ``BatchLoader``: shard ``shard`` of ``num_shards`` of every batch."""

    def __init__(
        self,
        *,
        labels: Mapping[str, Sequence[str]] = LABELS,
        shard: int = 0,
        num_shards: int = 1,
        rows_per_label: int = 1,
    ) -> None:
        self.labels = labels
        self._rows_per_label = rows_per_label
        self.skipped: dict[str, int] = {}
        self.num_draws = 0
        self.drawn = 0
        self._shard, self._num_shards = shard, num_shards

    @abstractmethod
    def full_batch(self, number: int) -> Batch:
        """Return all rows of a batch. Training uses the numbers from 1 on, validation 0."""

    def __next__(self) -> Batch:
        self.drawn += 1
        return self._read_shard(self.drawn)

    def state(self) -> dict[str, Any]:
        """Return the number of batches drawn."""
        return {"drawn": self.drawn}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue after the batch of ``state``."""
        self.drawn = int(state["drawn"])

    def held_out_batches(self, split: str, *, rows: int | None) -> Iterator[Batch]:  # noqa: ARG002
        """Yield one batch that training does not use."""
        yield self._read_shard(0)

    def final_notes(self) -> list[str]:
        """Return no notes: no row is left out."""
        return []

    def close(self) -> None:  # noqa: B027 - for subclasses that open a file
        """Do nothing: there is no file to close."""

    def _read_shard(self, number: int) -> Batch:
        batch = self.full_batch(number)
        return shard_batch(
            batch, rank=self._shard, world_size=self._num_shards, together=self._rows_per_label
        )


class UnevenBatches(SyntheticBatches):
    """Batches of ``shape``; every third has a quarter of the rows."""

    def __init__(
        self, shape: SyntheticShape, *, seed: int, shard: int = 0, num_shards: int = 1
    ) -> None:
        super().__init__(shard=shard, num_shards=num_shards, rows_per_label=shape.rows_per_label)
        self._shape, self._seed = shape, seed

    def full_batch(self, number: int) -> Batch:
        rows = self._shape.rows if number % 3 else max(1, self._shape.rows // 4)
        rows += -rows % self._shape.rows_per_label
        return uneven_batch(self._shape, rows=rows, seed=1_000_003 * self._seed + number)


def shard_batch(batch: Batch, *, rank: int, world_size: int, together: int = 1) -> Batch:
    """Return every ``world_size``-th run of ``together`` rows, from the run ``rank`` on."""
    runs = torch.arange(batch.rows).view(-1, together)
    return batch.select(runs[rank::world_size].flatten())


def uneven_batch(shape: SyntheticShape, *, rows: int, seed: int) -> Batch:
    """Return rows of 2 to ``shape.length`` tokens each, drawn with ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    target = _random_ids(rows, shape.length, generator=generator)
    place = torch.arange(shape.length)
    predicted = place < target.lengths[:, None] - 1
    if not shape.source:  # a decoder-only model does not predict its prompt
        prompt = torch.randint(1, 3, (rows, 1), generator=generator)
        predicted &= place >= prompt - 1
    batch = Batch(
        source=_random_ids(rows, shape.length if shape.source else 0, generator=generator),
        target=target,
        labels=target.values.roll(-1, dims=1).where(predicted, IGNORE_LABEL),
        groups={
            TASK: torch.randint(len(TASKS), (rows,), generator=generator),
            SOURCE_LANGUAGE: torch.randint(len(LANGUAGES), (rows,), generator=generator),
            TARGET_LANGUAGE: torch.randint(len(LANGUAGES), (rows,), generator=generator),
        },
        key=torch.randint(2**62, (rows,), generator=generator),
    )
    if (shape.value_shape, shape.labels) == ((), TOKEN_LABELS):
        return batch
    return _of_other_kind(batch, shape, generator=generator)


def _of_other_kind(batch: Batch, shape: SyntheticShape, *, generator: torch.Generator) -> Batch:
    """Return the same rows with the values and labels of an input and a head of other kinds."""

    def values_of(rows: InputRows) -> InputRows:
        drawn = torch.randn(rows.rows, rows.width, *shape.value_shape, generator=generator)
        return InputRows(drawn, rows.lengths) if shape.value_shape else rows

    target, kind = values_of(batch.target), torch.randint(2, (batch.rows,), generator=generator)
    labels = batch.labels
    if shape.labels == ROW_LABELS:
        runs = torch.arange(batch.rows) // shape.rows_per_label
        labels = kind.where(runs % 5 != 4, IGNORE_LABEL)
    elif shape.labels == POINT_LABELS:
        points = torch.randn(labels.shape, generator=generator)
        labels = points.where(target.real, torch.nan)
    return replace(
        batch,
        source=values_of(batch.source),
        target=target,
        labels=labels,
        groups={**batch.groups, "class": kind},
    )


def _random_ids(rows: int, length: int, *, generator: torch.Generator) -> InputRows:
    ids = torch.randint(FIRST_ID, VOCABULARY, (rows, length), generator=generator)
    lengths = torch.randint(2, max(length, 2) + 1, (rows, 1), generator=generator)[:, 0]
    return InputRows(ids, lengths.clamp(max=length))
