"""Document packing: documents of any length to rows of at most a fixed length, without a loss.

A document of n tokens has n + 1 positions: its tokens and the end of text are predicted, each once,
from the begin token and the tokens before it. A piece is a range of positions of one document, and
a row is one piece or several. A row that begins within a document starts with the token before it,
so that no prediction is lost at a cut.

Letters: N documents, P pieces, R rows, W the largest length of a row.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moesaic.core.config import Choice
from moesaic.data.ragged import IntArray, Ragged
from moesaic.data.token_shards import TokenShards

_SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")
BEGIN = -1
"""In the inputs of ``gather_documents``: where the collator writes the begin token."""


@dataclass(frozen=True, slots=True)
class DocumentPieces:
    """Pieces [P] by row: positions ``start`` to ``start + length`` of a ``document``."""

    document: IntArray
    start: IntArray
    length: IntArray
    row: IntArray

    @staticmethod
    def join(parts: "Sequence[DocumentPieces]", *, first_row: int = 0) -> "DocumentPieces":
        """Return the pieces of all parts, their rows numbered one after another."""
        columns: list[list[IntArray]] = [[np.zeros(0, dtype=np.int64)] for _ in range(4)]
        for part in parts:
            values = (part.document, part.start, part.length, part.row + first_row)
            first_row += int(part.row.max(initial=-1)) + 1
            for column, value in zip(columns, values, strict=True):
                column.append(value)
        return DocumentPieces(*map(np.concatenate, columns))

    @property
    def row_lengths(self) -> IntArray:
        """The number of positions of each row [R]."""
        return np.bincount(self.row, weights=self.length).astype(np.int64)

    @property
    def first_of_row(self) -> IntArray:
        """The index of the first piece of each row that has one."""
        return np.flatnonzero(np.diff(self.row, prepend=-1))

    def of_rows(self, rows: IntArray) -> "DocumentPieces":
        """Return the pieces of some rows, which are numbered in the order of ``rows``."""
        begin, end = (np.searchsorted(self.row, rows, side=side) for side in _SIDES)
        found = Ragged.gather(np.arange(self.row.size), starts=begin, lengths=end - begin)
        index = found.tokens
        return DocumentPieces(
            self.document[index], self.start[index], self.length[index], found.row_index
        )


class DocumentPacking(Choice):
    """Family: how documents become rows.

    ``WholeTexts`` (a row is a text, longer ones are skipped), ``Concatenated`` (attention across
    the borders of documents) or ``Separated`` (not across them).
    """

    @abstractmethod
    def pieces(self, length: IntArray, *, stream: IntArray, window: int) -> DocumentPieces | None:
        """Return the pieces of documents of ``length`` [N] positions; None: a row is a text.

        ``stream`` [N] is of each document: pieces of two streams are never in one row, so that
        every row has one language and one domain. ``window`` is W.
        """


class WholeTexts(DocumentPacking):
    """A row is a whole text; those longer than the limit are skipped and counted."""

    def pieces(self, length: IntArray, *, stream: IntArray, window: int) -> None:  # noqa: ARG002
        return None


class Separated(DocumentPacking):
    """A row is a document, or a piece of a longer one; positions begin at 0 in each row.

    Nothing but the row itself is attended to or enters a recurrent state, and no mask is needed for
    that. Norms, projections and experts see no padding (``nn/packing.py``); rows of similar length
    are batched together, which leaves little to attention.
    """

    def pieces(self, length: IntArray, *, stream: IntArray, window: int) -> DocumentPieces:  # noqa: ARG002
        count = -(-length // window)
        parts = Ragged(np.zeros(int(count.sum()), dtype=np.int64), count)
        document, start = parts.row_index, parts.position_in_row * window
        size = np.minimum(window, length[document] - start)
        return DocumentPieces(document, start, size, np.arange(len(document)))


class Concatenated(DocumentPacking):
    """The documents of a stream joined by the end of text, cut into rows of exactly W positions.

    The last row of a stream in each window of draws is shorter. Tokens attend across the borders of
    documents, as in GPT-2 and GPT-3 (arXiv:2005.14165).
    """

    def pieces(self, length: IntArray, *, stream: IntArray, window: int) -> DocumentPieces:
        order = np.argsort(stream, kind="stable")
        begin = _stream_offsets(length[order], stream=stream[order], window=window)
        end = begin + length[order]
        count = np.where(length[order] > 0, (end - 1) // window - begin // window + 1, 0)
        parts = Ragged(np.zeros(int(count.sum()), dtype=np.int64), count)
        which = parts.row_index
        row = begin[which] // window + parts.position_in_row
        start = np.maximum(begin[which], row * window)
        stop = np.minimum(end[which], (row + 1) * window)
        return DocumentPieces(order[which], start - begin[which], stop - start, row)


@dataclass(frozen=True, slots=True)
class DocumentRows:
    """Packed rows of a batch: their indices in it [R], inputs and labels of equal lengths.

    ``inputs`` are ``BEGIN`` at the first position of each document.
    """

    rows: IntArray
    inputs: Ragged
    labels: Ragged


def gather_documents(
    shards: TokenShards, pieces: DocumentPieces, *, eos: int
) -> DocumentRows | None:
    """Return the tokens of pieces, whose documents are ids of texts; None where there is none."""
    if not pieces.row.size:
        return None
    text, rows = pieces.document, np.unique(pieces.row)
    count = shards.lengths(text)
    positions = Ragged(np.zeros(int(pieces.length.sum()), dtype=np.int64), pieces.length)
    piece, offset = positions.row_index, positions.position_in_row
    position = pieces.start[piece] + offset
    # a piece begins with the token before it, which its document has unless it begins there
    before = np.minimum(pieces.start, 1)
    first = pieces.start - before
    taken = np.minimum(pieces.start + pieces.length, count) - first
    found = shards.gather_parts(text, first=first, lengths=taken)
    inputs = np.full(position.size, BEGIN, dtype=np.int64)
    labels = np.full(position.size, eos, dtype=np.int64)
    at = found.starts[piece] + before[piece] + offset  # of the label of each position
    inner = position < count[piece]
    labels[inner] = found.tokens[at[inner]]
    later = position > 0
    inputs[later] = found.tokens[at[later] - 1]
    lengths = pieces.row_lengths[rows]
    return DocumentRows(rows, Ragged(inputs, lengths), Ragged(labels, lengths))


def _stream_offsets(length: IntArray, *, stream: IntArray, window: int) -> IntArray:
    """Return where each document begins [N], sorted by stream, every stream at a row of its own."""
    if not length.size:
        return length
    change = np.flatnonzero(np.diff(stream)) + 1
    edges = np.concatenate([[0], change, [len(stream)]])
    ends = np.cumsum(length)
    totals = np.diff(np.concatenate([[0], ends[edges[1:] - 1]]))
    rows = -(-totals // window)
    shift = (np.cumsum(rows) - rows) * window - (np.cumsum(totals) - totals)
    return ends - length + np.repeat(shift, np.diff(edges))
