"""Text noise: published rates, bounds on lengths, and independence of rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline_cases as cases
from moesaic.data.numpy_counter_rng import random_bits
from moesaic.data.tasks import Denoising
from moesaic.data.text_noise import DeleteTokens, InfillSpans, MaskTokens, ShuffleTokens
from moesaic.data.vocabulary import Vocabulary

MASK = 7
ROLES = Vocabulary(1000, eos=2, mask=MASK)
NOISES = [InfillSpans(), DeleteTokens(ratio=0.5), MaskTokens(), ShuffleTokens(), Denoising()]
ROWS = st.lists(st.lists(st.sampled_from([0, 1, 2, 3, *range(10, 99)]), max_size=40), max_size=12)


def damaged(noise, rows: list[list[int]], *, seed: int = 0) -> list[list[int]]:
    ragged, key = cases.ragged(rows), random_bits(seed, np.arange(len(rows)))
    call = noise.corrupt_source if isinstance(noise, Denoising) else noise
    return cases.lists(call(ragged, key=key, vocabulary=ROLES)) if rows else []


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: type(noise).__name__)
@settings(max_examples=50, deadline=None)
@given(rows=ROWS, seed=st.integers(0, 99))
def test_no_noise_makes_a_row_longer_or_empty(noise, rows, seed):
    for before, after in zip(rows, damaged(noise, rows, seed=seed), strict=True):
        assert len(after) <= len(before)
        assert bool(after) == bool(before)
        assert set(after) <= set(before) | {MASK}


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: type(noise).__name__)
def test_the_noise_of_a_row_is_independent_of_other_rows(noise):
    rows = [list(range(10, 10 + n)) for n in (5, 0, 17, 1, 40)]
    key = random_bits(7, np.arange(len(rows)))
    call = noise.corrupt_source if isinstance(noise, Denoising) else noise
    together = cases.lists(call(cases.ragged(rows), key=key, vocabulary=ROLES))
    alone = [
        cases.lists(call(cases.ragged([r]), key=key[i : i + 1], vocabulary=ROLES))[0]
        for i, r in enumerate(rows)
    ]
    assert together == alone
    assert (
        cases.lists(
            call(cases.ragged(rows), key=random_bits(8, np.arange(len(rows))), vocabulary=ROLES)
        )
        != together
    )


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 80), seed=st.integers(0, 999))
def test_infilling_replaces_exactly_its_ratio_in_spans(length, seed):
    row = list(range(100, 100 + length))
    found = damaged(InfillSpans(), [row], seed=seed)[0]
    kept = [token for token in found if token != MASK]
    assert len(kept) == length - int(np.ceil(0.35 * length))
    assert kept == sorted(kept)


def test_infilled_spans_are_poisson_and_anywhere_in_the_row():
    rows = [list(range(100, 500))] * 400
    found = damaged(InfillSpans(), rows)
    spans = np.array([row.count(MASK) for row in found])
    assert spans.mean() == pytest.approx(140 / 3.5, rel=0.03)
    kept = np.zeros(400)
    for row in found:
        kept[[token - 100 for token in row if token != MASK]] += 1
    assert abs(kept[:100].mean() - kept[150:250].mean()) < 12  # of 400, expected 260 each
    assert abs(kept[-100:].mean() - kept[150:250].mean()) < 12


@pytest.mark.parametrize("ratio", [0.1, 0.4])
def test_deletion_and_masking_affect_their_ratio_of_tokens(ratio):
    rows = [list(range(100, 300))] * 200
    dropped = sum(map(len, damaged(DeleteTokens(ratio=ratio), rows))) / 40_000
    blanked = sum(r.count(MASK) for r in damaged(MaskTokens(ratio=ratio), rows)) / 40_000
    assert dropped == pytest.approx(1 - ratio, abs=0.012)
    assert blanked == pytest.approx(ratio, abs=0.012)


def test_shuffling_moves_tokens_up_to_its_distance():
    rows = [list(range(100, 200))] * 300
    found = np.array(damaged(ShuffleTokens(distance=3), rows))
    moved = np.abs(found - np.arange(100, 200))
    assert moved.max() == 3
    assert sorted(found[0].tolist()) == rows[0]
    assert damaged(ShuffleTokens(distance=0), rows[:1]) == rows[:1]
