"""Plan: how a window of rows of known lengths is cut into batches, and a batch into rank shares.

Letters: N rows of the window, B rows of a batch. Area is rows * (longest source + longest target).
"""

import numpy as np

from moesaic.data.layout import RowLengths
from moesaic.data.ragged import IntArray


def bucket_by_length(lengths: RowLengths, *, batch_tokens: int, key: IntArray) -> list[IntArray]:
    """Return the rows of each batch, rows of like length together, no area over ``batch_tokens``.

    ``key[N]`` breaks ties, so that equal lengths are not grouped by stream. The batches are as few
    as filling each to the brim makes them, and then as equal in area as that number allows: no
    rest is left over at the end of a window.
    """
    source, target = lengths
    # the longer side first: it decides the area; the other side then varies least within a batch
    order = np.lexsort((key, source, np.maximum(source, target)))
    source, target = source[order], target[order]
    ends = _batch_ends(source, target, batch_tokens)
    low, high = batch_tokens // 2, batch_tokens
    while high - low > max(1, batch_tokens // 64):
        middle = (low + high) // 2
        found = _batch_ends(source, target, middle)
        low, high = (low, middle) if len(found) == len(ends) else (middle, high)
        ends = found if len(found) == len(ends) else ends
    return np.split(order, ends[:-1]) if ends else []


def rows_of_rank(rows: IntArray, *, rank: int, num_replicas: int) -> IntArray:
    """Return one rank's part of a batch whose rows are in order of length.

    Dealt there and back (0 1 2 2 1 0), so that no rank gets only the longer ones; each row goes to
    exactly one rank, and ranks differ by at most one row.
    """
    turn = np.arange(len(rows)) % (2 * num_replicas)
    return rows[np.minimum(turn, 2 * num_replicas - 1 - turn) == rank]


def _batch_ends(source: IntArray, target: IntArray, budget: int) -> list[int]:
    """Return where each batch ends when every batch takes rows until its area is full."""
    ends, first = [], 0
    while first < len(source):
        most = max(1, budget // max(1, int(source[first] + target[first])))
        here = slice(first, first + most)
        widest = np.maximum.accumulate(source[here]) + np.maximum.accumulate(target[here])
        area = widest * np.arange(1, len(widest) + 1)
        first += max(1, int(np.searchsorted(area, budget, side="right")))
        ends.append(first)
    return ends
