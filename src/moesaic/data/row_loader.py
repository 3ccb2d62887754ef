"""The row loader: batches of rows that are computed from their numbers (series, images, pairs).

Draws alternate between the groups of a data set (``draw n`` is of group ``n modulo G``), and a
group takes a new permutation of its rows in every epoch. So the n-th draw is a function of the seed
and n alone, the only state is n, and the global batches do not depend on the number of ranks.

Letters: N draws, G groups, B rows of a batch.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from moesaic.core.config import Choice
from moesaic.core.errors import CheckpointError, DataError
from moesaic.core.file_reader import MIB, FileKind, FileShape, parse_shape
from moesaic.data.batch import Batch
from moesaic.data.batch_stream import DataReplica
from moesaic.data.loader import MAX_DRAWS, PrefetchedBatches
from moesaic.data.numpy_counter_rng import UInt64Array, random_bits, random_permutation
from moesaic.data.ragged import IntArray

STATE_FORMAT = 1
_EPOCH, _ROW_KEY, _HELD_OUT = 31, 32, 33
HELD_OUT_SPLITS = ("valid", "test")  # the same rows
_SINGLE_REPLICA = DataReplica()


@dataclass(frozen=True, slots=True)
class RowDraws:
    """Draws [N]: each a ``row`` of a ``group``, with the random bits ``key`` of the sample."""

    group: IntArray
    row: IntArray
    key: UInt64Array

    def __len__(self) -> int:
        return self.group.shape[0]

    def of_replica(self, replica: DataReplica) -> "RowDraws":
        """Return every ``num_replicas``-th draw, from ``rank`` on."""
        part = slice(replica.rank, None, replica.num_replicas)
        return RowDraws(self.group[part], self.row[part], self.key[part])


def draw_rows(numbers: IntArray, *, sizes: IntArray, seed: int) -> RowDraws:
    """Return the draws with these numbers [N] from groups of ``sizes`` [G], none of them zero."""
    group = numbers % len(sizes)
    nth, size = numbers // len(sizes), sizes[group]
    key = random_bits(seed, _EPOCH, group, nth // size)
    row = random_permutation(nth % size, size=size, key=key)
    return RowDraws(group, row, random_bits(seed, _ROW_KEY, numbers))


def held_out_rows(*, sizes: IntArray, rows: int | None) -> RowDraws:
    """Return at most ``rows`` draws of each group, chosen by hash: the same in every call."""
    counts = np.minimum(sizes, rows) if rows else sizes
    group = np.repeat(np.arange(len(sizes)), counts)
    nth = np.arange(len(group)) - np.repeat(np.cumsum(counts) - counts, counts)
    key = random_bits(_HELD_OUT, group)
    row = random_permutation(nth, size=sizes[group], key=key)
    return RowDraws(group, row, random_bits(_HELD_OUT, group, row))


@dataclass(frozen=True, slots=True)
class RowOrigin:
    """Where rows are from: a name, its licence, and the number of its points or images."""

    name: str
    licence: str
    size: int


class RowDataset(ABC):
    """Groups of rows, and how they become a batch.

    ``labels`` names the values of each label in ``Batch.groups``. ``fingerprint`` identifies the
    content: two data sets with the same one give the same batches. ``origins`` are for the model
    card.
    """

    labels: Mapping[str, Sequence[str]]
    fingerprint: str
    origins: Sequence[RowOrigin]

    @abstractmethod
    def sizes(self, split: str) -> IntArray:
        """Return the number of rows of each group [G] in ``train``, ``valid`` or ``test``."""

    @abstractmethod
    def make_batch(self, draws: RowDraws, *, split: str) -> Batch:
        """Return the batch of these draws (perhaps none), in their order."""


class RowSource(Choice):
    """Family: what rows are made of. ``positions`` is the length of the longest row."""

    @property
    def positions(self) -> int:
        raise NotImplementedError

    def open(self, notify: Callable[[str], None]) -> RowDataset:
        """Return the data set; it may be downloaded first, which ``notify`` is told."""
        raise NotImplementedError


class RowLoader(PrefetchedBatches[Batch]):
    """Iterates over one replica's batches of ``rows`` draws over all replicas together."""

    def __init__(
        self,
        dataset: RowDataset,
        *,
        rows: int,
        seed: int,
        replica: DataReplica = _SINGLE_REPLICA,
        prefetch: int = 4,
    ) -> None:
        """Raises DataError where a group has no training rows."""
        self._dataset, self._rows, self._seed = dataset, rows, seed
        self._replica, self._prefetch, self._first = replica, prefetch, 0
        self._sizes = dataset.sizes("train")
        if not self._sizes.all() or not self._sizes.size:
            raise DataError(f"found groups of {self._sizes.tolist()} rows, expected one or more")
        parts = [dataset.fingerprint, rows, seed]
        self._fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def labels(self) -> Mapping[str, Sequence[str]]:
        """The values of each label in ``Batch.groups``, by name."""
        return self._dataset.labels

    @property
    def skipped(self) -> Mapping[str, int]:
        return {}

    @property
    def num_draws(self) -> int:
        """Rows drawn so far, by all replicas."""
        return self._first

    def final_notes(self) -> list[str]:
        """Return the sentences to print when training ends: none."""
        return []

    def state(self) -> dict[str, Any]:
        """Return the position of the next batch, as JSON."""
        return {"format": STATE_FORMAT, "fingerprint": self._fingerprint, "first": self._first}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue at ``state``, on any number of ranks. Raises CheckpointError."""
        where = "the saved data position"
        shape = parse_shape(
            json.dumps(state).encode(), _PositionShape, kind=_PositionShape.kind, where=where
        )
        if shape.format != STATE_FORMAT or shape.fingerprint != self._fingerprint:
            raise CheckpointError(
                f"{where} is of other data, another seed or other batches (found "
                f"{shape.fingerprint[:8]}, expected {self._fingerprint[:8]}); continue with the "
                "config it was saved with"
            )
        self.close()
        self._first = shape.first

    def held_out_batches(self, split: str = "valid", *, rows: int | None = None) -> Iterator[Batch]:
        """Yield this replica's part of a held-out split: the same in every call.

        At most ``rows`` rows of each group are used, chosen by hash. Raises DataError for a split
        that is not held out.
        """
        if split not in HELD_OUT_SPLITS:
            names = " and ".join(HELD_OUT_SPLITS)
            raise DataError(f'this data has no split "{split}": its held-out rows are {names}')
        draws = held_out_rows(sizes=self._dataset.sizes(split), rows=rows)
        for first in range(0, len(draws), self._rows):
            window = slice(first, first + self._rows)
            part = RowDraws(draws.group[window], draws.row[window], draws.key[window])
            yield self._dataset.make_batch(part.of_replica(self._replica), split=split)

    def _items(self) -> tuple[Iterator[Batch], int]:
        return self._batches_from(self._first), self._prefetch

    def _advance(self, item: Batch) -> Batch:
        self._first += self._rows
        return item

    def _batches_from(self, first: int) -> Iterator[Batch]:
        while True:
            numbers = np.arange(first, first + self._rows)
            draws = draw_rows(numbers, sizes=self._sizes, seed=self._seed)
            yield self._dataset.make_batch(draws.of_replica(self._replica), split="train")
            first += self._rows


class _PositionShape(FileShape):
    kind: ClassVar[FileKind] = FileKind(
        name="data position", max_bytes=1 * MIB, error=CheckpointError
    )
    format: int
    fingerprint: str
    first: int = Field(ge=0, le=MAX_DRAWS)
