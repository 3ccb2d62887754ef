"""Repetition rules against plain loops over python lists."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.model.repetition import (
    block_repeated_ngrams,
    count_repeats,
    is_loop,
    penalise_repeated_tokens,
)

V = 5
ROWS = st.integers(0, 9).flatmap(
    lambda length: st.lists(
        st.lists(st.integers(0, V - 1), min_size=length, max_size=length), min_size=1, max_size=3
    )
)
bounded = settings(max_examples=80, derandomize=True, deadline=None)


def _tensor(rows):
    return torch.tensor(rows, dtype=torch.long).view(len(rows), -1)


@bounded
@given(ROWS, st.integers(1, 4))
def test_a_token_is_blocked_if_it_would_complete_an_ngram_seen_before(rows, size):
    found = block_repeated_ngrams(torch.zeros(len(rows), V), ids=_tensor(rows), size=size)
    for row, blocked in zip(rows, found.isinf().tolist(), strict=True):
        seen = [row[i : i + size] for i in range(len(row) - size + 1)]
        begun = row[len(row) - size + 1 :] if len(row) >= size - 1 else None
        want = [begun is not None and [*begun, token] in seen for token in range(V)]
        assert blocked == want


@bounded
@given(ROWS, st.sampled_from([0.5, 1.0, 1.3]))
def test_logits_of_generated_tokens_are_divided_or_multiplied_once(rows, penalty):
    logits = torch.randn(len(rows), V)
    found = penalise_repeated_tokens(logits, ids=_tensor(rows), penalty=penalty)
    for i, row in enumerate(rows):
        for token in range(V):
            want = float(logits[i, token])
            if token in row:
                want = want * penalty if want < 0 else want / penalty
            assert float(found[i, token]) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(
    ("ids", "repeats"),
    [
        ([], 1),
        ([7], 1),
        ([7] * 3, 1),  # too short to count
        ([7] * 12, 12),
        ([1, 2] * 6, 6),
        ([9, 8, *[1, 2, 3] * 5, 4], 5),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], 1),
    ],
)
def test_copies_of_a_passage_in_a_row_are_counted(ids, repeats):
    assert count_repeats(ids) == repeats


def test_an_answer_loops_only_if_its_source_does_not():
    assert is_loop([1, 2] * 10, source=[5, 6, 7])
    assert not is_loop([1, 2] * 10, source=[3, 4] * 9)  # "ha ha ha ..." stays one
    assert not is_loop([1, 2, 1, 2, 1, 2], source=[5, 6, 7])
