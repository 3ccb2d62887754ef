import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline_cases as cases
from moesaic.data.document_packing import (
    BEGIN,
    Concatenated,
    DocumentPieces,
    Separated,
    WholeTexts,
    gather_documents,
)

END = 7
PACKINGS = st.sampled_from([Concatenated(), Separated()])
DOCUMENTS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 2)), max_size=12)


def pack(packing, documents, window) -> DocumentPieces:
    length, stream = np.array(documents, dtype=np.int64).reshape(-1, 2).T
    return packing.pieces(length, stream=stream, window=window)


@settings(max_examples=100, deadline=None)
@given(packing=PACKINGS, documents=DOCUMENTS, window=st.integers(1, 50))
def test_every_position_of_every_document_is_in_one_piece(packing, documents, window):
    pieces = pack(packing, documents, window)
    found = sorted(
        (int(d), p)
        for d, s, n in zip(pieces.document, pieces.start, pieces.length, strict=True)
        for p in range(s, s + n)
    )
    assert found == [(d, p) for d, (length, _) in enumerate(documents) for p in range(length)]
    assert pieces.row_lengths.max(initial=0) <= window
    assert sorted(set(pieces.row)) == list(range(pieces.row_lengths.size))


@settings(max_examples=50, deadline=None)
@given(documents=DOCUMENTS, window=st.integers(1, 50))
def test_concatenated_rows_are_full_but_for_the_last_of_each_stream(documents, window):
    pieces = pack(Concatenated(), documents, window)
    streams = np.array([stream for _, stream in documents], dtype=np.int64)[pieces.document]
    for stream in np.unique(streams):
        rows = np.unique(pieces.row[streams == stream])
        assert (pieces.row_lengths[rows[:-1]] == window).all()
    of_row = [len(set(streams[pieces.row == row])) for row in np.unique(pieces.row)]
    assert set(of_row) <= {1}


def test_a_separated_row_is_a_piece_of_one_document():
    pieces = pack(Separated(), [(10, 0), (3, 0)], 4)
    assert pieces.document.tolist() == [0, 0, 0, 1]
    assert pieces.start.tolist() == [0, 4, 8, 0]
    assert pieces.length.tolist() == [4, 4, 2, 3]
    assert WholeTexts().pieces(np.array([5]), stream=np.array([0]), window=3) is None


@pytest.mark.parametrize("packing", [Concatenated(), Separated()])
def test_gathered_rows_equal_the_documents_shifted_by_one(packing):
    shards = cases.shards()
    rows = shards.text_rows("ell_Grek")
    texts = rows.text_ids(np.arange(9))[0]
    documents = cases.lists(shards.gather(texts))
    length = np.array([len(ids) + 1 for ids in documents])
    pieces = packing.pieces(length, stream=np.zeros_like(texts), window=7)
    named = DocumentPieces(texts[pieces.document], pieces.start, pieces.length, pieces.row)
    found = gather_documents(shards, named, eos=END)
    assert found is not None
    inputs, labels = [], []
    for number, ids in enumerate(documents):
        part = pieces.document == number
        assert part.any()
        inputs += [BEGIN, *ids]
        labels += [*ids, END]
    assert found.inputs.tokens.tolist() == inputs
    assert found.labels.tokens.tolist() == labels
    assert found.labels.lengths.tolist() == pieces.row_lengths.tolist()
