"""Row planning: from drawn texts to the rows of batches, by lengths alone.

A row is a text of a task, or what the task's packing makes of documents. Letters: N drawn texts,
R rows, P pieces of documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesaic.data.collators import Collator, RowLengths
from moesaic.data.document_packing import DocumentPieces
from moesaic.data.ragged import IntArray
from moesaic.data.tasks import Task


@dataclass(frozen=True, slots=True)
class DrawnTexts:
    """Drawn texts [N]: their streams and tasks, ids and lengths of both sides."""

    stream: IntArray
    task: IntArray
    source: IntArray
    target: IntArray
    lengths: RowLengths


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Rows [R]: the draw that each is of or begins with, and its length.

    ``first`` is the position of its document that a packed row begins with, plus one; 0 for a whole
    text. ``pieces`` are of the packed rows, with the id of each document's text.
    """

    draw: IntArray
    first: IntArray
    lengths: RowLengths
    pieces: DocumentPieces

    def select(self, rows: IntArray) -> "RowPlan":
        """Return some of the rows, in that order."""
        lengths = RowLengths(self.lengths.source[rows], self.lengths.target[rows])
        pieces = self.pieces.of_rows(rows)
        return RowPlan(self.draw[rows], self.first[rows], lengths, pieces)


def plan_rows(
    texts: DrawnTexts, *, tasks: Sequence[Task], collator: Collator, window: int
) -> RowPlan:
    """Return the rows of all texts; rows of packed documents have at most ``window`` tokens.

    Whole texts come first, in the order of the draws; they may be of any length.
    """
    whole = np.ones(len(texts.stream), dtype=np.bool_)
    source_lengths = texts.lengths.source.copy()
    packed: list[DocumentPieces] = []
    for number, task in enumerate(tasks):
        draw = np.flatnonzero(texts.task == number)
        source_lengths[draw] = task.max_source_lengths(texts.lengths.source[draw])
        length, stream = texts.lengths.target[draw] + 1, texts.stream[draw]
        pieces = task.pieces(length, stream=stream, window=window)
        if pieces is not None:
            whole[draw] = False
            packed.append(
                DocumentPieces(draw[pieces.document], pieces.start, pieces.length, pieces.row)
            )
    draw = np.flatnonzero(whole)
    lengths = collator.lengths(source_lengths[draw], target=texts.lengths.target[draw])
    joined = DocumentPieces.join(packed, first_row=len(draw))
    begin, size = joined.first_of_row, joined.row_lengths[len(draw) :]
    return RowPlan(
        draw=np.concatenate([draw, joined.document[begin]]),
        first=np.concatenate([np.zeros_like(draw), joined.start[begin] + 1]),
        lengths=RowLengths(
            np.concatenate([lengths.source, np.zeros_like(size)]),
            np.concatenate([lengths.target, size]),
        ),
        pieces=DocumentPieces(
            texts.target[joined.document], joined.start, joined.length, joined.row
        ),
    )


def first_rows_of_each(group: IntArray, *, count: int) -> IntArray:
    """Return the indices, ascending, of the first ``count`` members of each group [R]."""
    order = np.argsort(group, kind="stable")
    _, starts, sizes = np.unique(group[order], return_index=True, return_counts=True)
    rank = np.arange(len(group)) - np.repeat(starts, sizes)
    return np.sort(order[rank < count])
