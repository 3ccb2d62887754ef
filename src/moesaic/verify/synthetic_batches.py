"""Synthetic batches of rows of uneven lengths, for a run without a corpus.

The n-th batch is a function of n. Its rows are sharded round-robin over the data-parallel ranks, so
some ranks have more tokens than others; every third batch has fewer rows than a large plan has
ranks, and some rows have no token at all. Letters: B rows, S source length, L target length.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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

VOCABULARY = 64
TASKS = ("one", "other")
LANGUAGES = ("aaa", "bbb", "ccc")
LABELS = {TASK: TASKS, SOURCE_LANGUAGE: LANGUAGES, TARGET_LANGUAGE: LANGUAGES}
FIRST_ID = 5


@dataclass(frozen=True, slots=True)
class SyntheticShape:
    """``rows`` of at most ``length`` tokens; ``source``: whether there is an encoder input."""

    rows: int = 10
    length: int = 11
    source: bool = True


class SyntheticBatches(ABC):
    """An endless ``BatchLoader``: shard ``shard`` of ``num_shards`` of every batch."""

    def __init__(
        self,
        *,
        labels: Mapping[str, Sequence[str]] = LABELS,
        shard: int = 0,
        num_shards: int = 1,
    ) -> None:
        self.labels = labels
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
        return shard_batch(batch, rank=self._shard, world_size=self._num_shards)


class UnevenBatches(SyntheticBatches):
    """Batches of ``shape``; every third has a quarter of the rows."""

    def __init__(
        self, shape: SyntheticShape, *, seed: int, shard: int = 0, num_shards: int = 1
    ) -> None:
        super().__init__(shard=shard, num_shards=num_shards)
        self._shape, self._seed = shape, seed

    def full_batch(self, number: int) -> Batch:
        rows = self._shape.rows if number % 3 else max(1, self._shape.rows // 4)
        return uneven_batch(self._shape, rows=rows, seed=1_000_003 * self._seed + number)


def shard_batch(batch: Batch, *, rank: int, world_size: int) -> Batch:
    """Return every ``world_size``-th row, from ``rank`` on."""
    return batch.select(slice(rank, None, world_size))


def uneven_batch(shape: SyntheticShape, *, rows: int, seed: int) -> Batch:
    """Return rows of 2 to ``shape.length`` tokens each, drawn with ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    target = _random_ids(rows, shape.length, generator=generator)
    place = torch.arange(shape.length)
    predicted = place < target.lengths[:, None] - 1
    if not shape.source:  # a decoder-only model does not predict its prompt
        prompt = torch.randint(1, 3, (rows, 1), generator=generator)
        predicted &= place >= prompt - 1
    return Batch(
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


def _random_ids(rows: int, length: int, *, generator: torch.Generator) -> InputRows:
    ids = torch.randint(FIRST_ID, VOCABULARY, (rows, length), generator=generator)
    lengths = torch.randint(2, max(length, 2) + 1, (rows, 1), generator=generator)[:, 0]
    return InputRows(ids, lengths.clamp(max=length))
