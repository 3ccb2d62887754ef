"""Text noise for denoising: functions that corrupt rows of tokens.

The noise of a row is a function of the row and its 64-bit key alone: the same in any batch, on any
rank, before and after a resume. No noise makes a row longer, or empty.

Letters: B rows, N tokens of all rows together.
"""

from typing import ClassVar

import numpy as np
from pydantic import Field

from moesaic.core.config import Choice
from moesaic.data.numpy_counter_rng import UInt64Array, random_uniform
from moesaic.data.ragged import IntArray, Ragged
from moesaic.data.vocabulary import Vocabulary

# one random stream per purpose, so that noises are independent
_SPAN_LENGTH, _SPAN_PLACE, _DELETE, _MASK, _SHUFFLE = 1, 2, 3, 4, 5


class TextNoise(Choice):
    """A corruption of rows. Several are applied in the order in which they are listed.

    ``roles`` are those of the vocabulary that it needs.
    """

    roles: ClassVar[tuple[str, ...]] = ()

    def __call__(self, rows: Ragged, *, key: UInt64Array, vocabulary: Vocabulary) -> Ragged:
        """Return corrupted ``rows``; ``key[B]`` are the random bits of each row.

        Raises DataError for a role that the vocabulary does not have.
        """
        raise NotImplementedError


class InfillSpans(TextNoise):
    """Replace each span by one mask token, so that its length must be predicted too.

    Text infilling of BART (arXiv:1910.13461) with the numbers of mBART (arXiv:2001.08210): spans of
    Poisson(3.5) tokens until 35 % are replaced; a span of length 0 inserts a mask. Spans do not
    overlap and are placed uniformly. Lengths are in tokens, where the papers have words. A row of n
    masked tokens has at most n spans, so it never grows.
    """

    roles: ClassVar[tuple[str, ...]] = ("mask",)
    ratio: float = Field(default=0.35, gt=0, lt=1)
    """Share of the tokens that is masked."""

    mean_length: float = Field(default=3.5, gt=0, le=20)
    """Mean span length, in tokens."""

    def __call__(self, rows: Ragged, *, key: UInt64Array, vocabulary: Vocabulary) -> Ragged:
        lengths = rows.lengths
        masked = np.ceil(lengths * self.ratio).astype(np.int64)
        spans = self._spans(masked, key=key)
        slots = lengths - masked + spans.lengths  # the tokens kept, and one mask per span
        grid = Ragged(np.zeros(int(slots.sum()), dtype=np.int64), slots)
        rank = _rank_in_row(
            grid, random_uniform(key[grid.row_index], _SPAN_PLACE, grid.position_in_row)
        )
        is_span = rank < spans.lengths[grid.row_index]
        step = np.ones(grid.tokens.size, dtype=np.int64)
        step[is_span] = spans.tokens  # in slot order, as the spans are in row order
        index = np.cumsum(step) - step  # rows are in the same order in both arrays
        out = np.full(grid.tokens.size, _mask(vocabulary), dtype=np.int64)
        out[~is_span] = rows.tokens[index[~is_span]]
        return Ragged(out, slots)

    def _spans(self, masked: IntArray, *, key: UInt64Array) -> Ragged:
        """Return span lengths that sum to ``masked`` in every row."""
        draws = Ragged(np.zeros(int(masked.sum()), dtype=np.int64), masked)
        numbers = random_uniform(key[draws.row_index], _SPAN_LENGTH, draws.position_in_row)
        drawn = np.searchsorted(_poisson_cdf(self.mean_length), numbers, side="right")
        total = np.concatenate(([0], np.cumsum(drawn)))
        # tokens in earlier spans of the row
        before = total[:-1] - total[draws.starts][draws.row_index]
        left = masked[draws.row_index] - before
        # the last draw fills what is left
        last = draws.position_in_row == masked[draws.row_index] - 1
        lengths = np.where(last, left, np.minimum(drawn, left))
        return Ragged(lengths, masked).select_tokens(left > 0)


class DeleteTokens(TextNoise):
    """Delete tokens (Lample et al. 2018, arXiv:1711.00043: word drop with p = 0.1)."""

    ratio: float = Field(default=0.1, ge=0, lt=1)
    """Probability that a token is deleted."""

    def __call__(self, rows: Ragged, *, key: UInt64Array, vocabulary: Vocabulary) -> Ragged:
        del vocabulary
        numbers = random_uniform(key[rows.row_index], _DELETE, rows.position_in_row)
        # the token with the largest number is kept, so that no row becomes empty
        return rows.select_tokens((numbers >= self.ratio) | (_rank_in_row(rows, -numbers) == 0))


class MaskTokens(TextNoise):
    """Replace tokens by mask tokens (Wang et al. 2020, arXiv:2010.02523; p = 0.1)."""

    roles: ClassVar[tuple[str, ...]] = ("mask",)
    ratio: float = Field(default=0.1, ge=0, le=1)
    """Probability that a token is masked."""

    def __call__(self, rows: Ragged, *, key: UInt64Array, vocabulary: Vocabulary) -> Ragged:
        hit = random_uniform(key[rows.row_index], _MASK, rows.position_in_row) < self.ratio
        return Ragged(np.where(hit, _mask(vocabulary), rows.tokens), rows.lengths)


class ShuffleTokens(TextNoise):
    """Shuffle locally: no token moves further than ``distance`` (arXiv:1711.00043: k = 3).

    Sorts by position + U(0, distance + 1).
    """

    distance: int = Field(default=3, ge=0)
    """Furthest that a token may move."""

    def __call__(self, rows: Ragged, *, key: UInt64Array, vocabulary: Vocabulary) -> Ragged:
        del vocabulary
        shift = random_uniform(key[rows.row_index], _SHUFFLE, rows.position_in_row) * (
            self.distance + 1
        )
        order = np.lexsort((rows.position_in_row + shift, rows.row_index))
        return Ragged(rows.tokens[order], rows.lengths)


def _mask(vocabulary: Vocabulary) -> int:
    return vocabulary.role("mask", needed_by="the noise of the denoising task")


def _rank_in_row(rows: Ragged, numbers: np.ndarray) -> IntArray:
    """Return the rank of every number [N] among those of its row."""
    order = np.lexsort((numbers, rows.row_index))
    ranks = np.empty_like(order)
    ranks[order] = rows.position_in_row
    return ranks


def _poisson_cdf(mean: float) -> np.ndarray:
    counts = np.arange(int(mean + 12 * mean**0.5 + 12))
    logs = counts * np.log(mean) - mean - np.cumsum(np.log(np.maximum(counts, 1)))
    return np.cumsum(np.exp(logs))
