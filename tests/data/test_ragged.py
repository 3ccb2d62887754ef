"""Ragged arrays against plain lists."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline_cases as cases
from moesaic.data.ragged import Ragged

ROWS = st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, data=st.data())
def test_ragged_rows_equal_lists(rows, data):
    ragged = cases.ragged(rows)
    assert cases.lists(ragged) == rows
    assert ragged.position_in_row.tolist() == [i for row in rows for i in range(len(row))]
    assert ragged.row_index.tolist() == [n for n, row in enumerate(rows) for _ in row]
    chosen = [data.draw(st.integers(0, len(rows) - 1)) for _ in range(5)]
    starts, lengths = ragged.starts[chosen], ragged.lengths[chosen]
    gathered = Ragged.gather(ragged.tokens, starts=starts, lengths=lengths)
    assert cases.lists(gathered) == [rows[n] for n in chosen]
    start, stop = sorted(data.draw(st.integers(0, len(rows))) for _ in range(2))
    part = ragged.slice(start, stop)
    assert len(part) == stop - start
    assert (cases.lists(part) if len(part) else []) == rows[start:stop]
    assert Ragged.concatenate([ragged, part]).lengths.tolist() == [
        len(r) for r in rows + rows[start:stop]
    ]
    even = ragged.select_tokens(ragged.tokens % 2 == 0)
    assert cases.lists(even) == [[x for x in row if x % 2 == 0] for row in rows]


def test_ragged_arrays_may_have_no_rows():
    assert len(Ragged.concatenate([])) == 0
    assert cases.lists(Ragged.empty(3)) == [[], [], []]
    assert cases.ragged([]).select_tokens(np.zeros(0, dtype=bool)).tokens.size == 0
