"""Law: the union of the ranks' rows is the same global batch for any number of ranks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline_cases as cases
from moesaic.data.collators import DecoderOnlyCollator


@pytest.mark.parametrize(
    ("world", "setup"),
    [(2, "whole texts"), (3, "concatenated"), (3, "separated"), (4, "whole texts")],
)
def test_the_union_over_ranks_is_the_same_for_any_number(world, setup):
    given = cases.SETUPS[setup]
    one = cases.loader(**given)
    parts = [cases.loader(**given, rank=r, world=world) for r in range(world)]
    for _ in range(60):  # several windows, and several epochs of the smallest stream
        whole, shares = next(one), [next(part) for part in parts]
        assert sorted(row for s in shares for row in cases.rows(s)) == cases.rows(whole)
        keys = sorted(int(key) for s in shares for key in s.key)
        assert keys == sorted(whole.key.tolist())
        assert len(set(keys)) == len(keys)
        sizes = [s.rows for s in shares]
        assert max(sizes) - min(sizes) <= 1


@settings(max_examples=10, deadline=None)
@given(batch_tokens=st.integers(90, 600), decoder_only=st.booleans(), seed=st.integers(0, 50))
def test_no_batch_is_over_the_token_budget(batch_tokens, decoder_only, seed):
    config = cases.SMALL.replace(batch_tokens=batch_tokens)
    if decoder_only:
        config = config.replace(collator=DecoderOnlyCollator(), max_target=80)
    stream = cases.loader(config=config, seed=seed)
    for _ in range(30):
        batch = next(stream)
        width = batch.source.width + batch.target.width
        assert 0 < batch.rows * width <= batch_tokens


def test_a_rank_without_rows_gets_an_empty_batch_of_the_same_kind():
    config = cases.SMALL.replace(batch_tokens=80)
    world = 8
    parts = [cases.loader(config=config, rank=r, world=world) for r in range(world)]
    shares = [next(part) for _ in range(20) for part in parts]
    empty = [s for s in shares if s.rows == 0]
    assert empty
    assert all(s.num_tokens == 0 and s.source.width > 0 for s in empty)
    assert all(s.source.values.dtype == shares[0].source.values.dtype for s in empty)


def test_held_out_batches_are_the_same_in_every_call_and_for_any_number_of_ranks():
    one = cases.loader()
    first = [cases.rows(b) for b in one.held_out_batches("valid", rows=20)]
    next(one)
    assert [cases.rows(b) for b in one.held_out_batches("valid", rows=20)] == first
    parts = [cases.loader(rank=r, world=2) for r in range(2)]
    shares = zip(*(part.held_out_batches("valid", rows=20) for part in parts), strict=True)
    assert [sorted(row for s in pair for row in cases.rows(s)) for pair in shares] == first
