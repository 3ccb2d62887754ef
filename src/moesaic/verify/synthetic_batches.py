"""UnevenBatches: made-up batches of rows of uneven lengths, for a run without a corpus.

The n-th batch is a function of n. Its rows are dealt to those who read rows, one after another, so
some have more tokens than others; every third batch has fewer rows than a large plan has readers,
and some of those hold no token at all. Letters: B rows, S source length, L target length.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch

from moesaic.core.shapes import Int, Tensor
from moesaic.data.batch import PAD, Batch

VOCABULARY = 64
TASKS = ("one", "other")
LANGUAGES = ("aaa", "bbb", "ccc")
FIRST_ID = 5


@dataclass(frozen=True, slots=True)
class SyntheticShape:
    """``rows`` of at most ``length`` tokens; ``source``: whether there is an encoder to read."""

    rows: int = 10
    length: int = 11
    source: bool = True


class UnevenBatches:
    """The part ``part`` of ``parts`` of every batch (see ``train.trainer.Stream``)."""

    tasks = TASKS
    languages = LANGUAGES

    def __init__(
        self, shape: SyntheticShape, *, seed: int, shard: int = 0, num_shards: int = 1
    ) -> None:
        self.skipped: dict[str, int] = {}
        self._shape, self._seed, self._shard_index, self._num_shards = (
            shape,
            seed,
            shard,
            num_shards,
        )
        self._drawn = 0

    def __next__(self) -> Batch:
        self._drawn += 1
        return self._read_shard(self._drawn)

    def state(self) -> dict[str, Any]:
        """Return how many batches were drawn."""
        return {"drawn": self._drawn}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after so many."""
        self._drawn = int(state["drawn"])

    def held_out_batches(self, split: str, *, rows: int | None) -> Iterator[Batch]:
        """Yield one batch that training never sees."""
        del split, rows
        yield self._read_shard(0)

    def close(self) -> None:
        """Nothing is open."""

    def _read_shard(self, number: int) -> Batch:
        rows = self._shape.rows if number % 3 else max(1, self._shape.rows // 4)
        whole = uneven_batch(self._shape, rows=rows, seed=1_000_003 * self._seed + number)
        return Batch(
            **{
                f.name: getattr(whole, f.name)[self._shard_index :: self._num_shards]
                for f in fields(Batch)
            }
        )


def uneven_batch(shape: SyntheticShape, *, rows: int, seed: int) -> Batch:
    """Return rows of 2 to ``shape.length`` tokens each, drawn with ``seed``."""
    draw = torch.Generator().manual_seed(seed)
    target = _random_ids(rows, shape.length, draw=draw)
    after = target.roll(-1, dims=1).where(target != PAD, PAD)
    after[:, -1] = PAD
    if not shape.source:  # what is read before it is answered is not predicted
        asked = torch.randint(1, 3, (rows, 1), generator=draw)
        after = after.where(torch.arange(shape.length) >= asked - 1, PAD)
    return Batch(
        source=_random_ids(rows, shape.length if shape.source else 0, draw=draw),
        target_in=target,
        target_out=after,
        task=torch.randint(len(TASKS), (rows,), generator=draw),
        source_language=torch.randint(len(LANGUAGES), (rows,), generator=draw),
        target_language=torch.randint(len(LANGUAGES), (rows,), generator=draw),
        key=torch.randint(2**62, (rows,), generator=draw),
    )


def _random_ids(rows: int, length: int, *, draw: torch.Generator) -> Int[Tensor, "B L"]:
    ids = torch.randint(FIRST_ID, VOCABULARY, (rows, length), generator=draw)
    lengths = torch.randint(2, max(length, 2) + 1, (rows, 1), generator=draw)
    return torch.where(torch.arange(length) < lengths, ids, PAD)
