"""Length bucketing: every row in one batch, no area over the budget, ranks divided evenly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.data.batch_stream import bucket_by_length, rows_of_rank
from moesaic.data.collators import RowLengths

LENGTHS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60)), max_size=300)


@settings(max_examples=80, deadline=None)
@given(pairs=LENGTHS, budget=st.integers(120, 3000))
def test_every_row_is_in_exactly_one_batch_and_none_is_over_the_budget(pairs, budget):
    lengths = RowLengths(*np.array(pairs, dtype=np.int64).reshape(-1, 2).T)
    batches = bucket_by_length(lengths, batch_tokens=budget, key=np.arange(len(pairs)))
    assert sorted(i for batch in batches for i in batch) == list(range(len(pairs)))
    for rows in batches:
        assert len(rows) * (lengths.source[rows].max() + lengths.target[rows].max()) <= budget


def test_batches_have_similar_areas_without_a_remainder():
    random = np.random.default_rng(0)
    source = random.geometric(0.05, 4000).clip(max=120)
    lengths = RowLengths(source, (source * random.uniform(0.7, 1.4, 4000)).astype(int).clip(1, 120))
    batches = bucket_by_length(lengths, batch_tokens=4096, key=np.arange(4000))
    areas = [len(b) * (lengths.source[b].max() + lengths.target[b].max()) for b in batches]
    assert min(areas) > 0.75 * max(areas)
    padded = 1 - (lengths.source.sum() + lengths.target.sum()) / sum(areas)
    assert padded < 0.2


def test_rows_of_equal_length_are_grouped_by_key_not_by_order():
    lengths = RowLengths(np.full(64, 8), np.full(64, 8))
    key = np.random.default_rng(0).permutation(64)
    first = bucket_by_length(lengths, batch_tokens=256, key=key)[0]
    assert sorted(key[first].tolist()) == list(range(16))


@pytest.mark.parametrize("world", [1, 2, 4, 7])
@pytest.mark.parametrize("count", [0, 1, 3, 29])
def test_a_batch_is_divided_completely_and_evenly(world, count):
    rows = np.arange(100, 100 + count)
    parts = [rows_of_rank(rows, rank=r, num_replicas=world) for r in range(world)]
    assert sorted(np.concatenate(parts).tolist()) == rows.tolist()
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_sum_of_lengths_is_near_equal_over_ranks():
    lengths = np.arange(10, 138)  # in order, as in a batch
    sums = [rows_of_rank(lengths, rank=r, num_replicas=4).sum() for r in range(4)]
    assert max(sums) == min(sums)
