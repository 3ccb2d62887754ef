"""Ragged arrays: rows of different lengths in one flat array, so that a batch takes few operations.

Letters: B rows, N tokens of all rows together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

IntArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Ragged:
    """``tokens[N]`` int64, and ``lengths[B]`` int64 that sum to N."""

    tokens: IntArray
    lengths: IntArray

    @classmethod
    def gather(cls, tokens: IntArray, *, starts: IntArray, lengths: IntArray) -> "Ragged":
        """Read the rows ``tokens[start : start + length]``, all at once."""
        lengths = lengths.astype(np.int64)
        offset = np.repeat(starts.astype(np.int64) - _exclusive_cumsum(lengths), lengths)
        return cls(tokens[offset + np.arange(offset.size)].astype(np.int64), lengths)

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int]]) -> "Ragged":
        """Return rows given one by one."""
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        return cls(np.array([x for row in rows for x in row], dtype=np.int64), lengths)

    @classmethod
    def empty(cls, rows: int) -> "Ragged":
        return cls(np.zeros(0, dtype=np.int64), np.zeros(rows, dtype=np.int64))

    @classmethod
    def concatenate(cls, parts: Sequence["Ragged"]) -> "Ragged":
        """Concatenate the rows of all parts."""
        if not parts:
            return cls.empty(0)
        return cls(
            np.concatenate([p.tokens for p in parts]), np.concatenate([p.lengths for p in parts])
        )

    def __len__(self) -> int:
        return self.lengths.shape[0]

    @property
    def starts(self) -> IntArray:
        return _exclusive_cumsum(self.lengths)

    @property
    def row_index(self) -> IntArray:
        """The row of every token [N]."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @property
    def position_in_row(self) -> IntArray:
        """The position of every token in its row [N]."""
        return np.arange(self.tokens.size) - np.repeat(self.starts, self.lengths)

    def slice(self, start: int, stop: int) -> "Ragged":
        """Return rows ``start`` to ``stop`` (a view)."""
        ends = np.cumsum(self.lengths)
        first = int(ends[start - 1]) if start else 0
        last = int(ends[stop - 1]) if stop else 0
        return Ragged(self.tokens[first:last], self.lengths[start:stop])

    def select_tokens(self, mask: IntArray) -> "Ragged":
        """Return the rows with only the tokens where ``mask[N]`` is true."""
        return Ragged(
            self.tokens[mask],
            np.bincount(self.row_index[mask], minlength=len(self)).astype(np.int64),
        )


def _exclusive_cumsum(lengths: IntArray) -> IntArray:
    return np.cumsum(lengths) - lengths
