"""Synthetic batches: a function of their number, uneven, and sharded completely."""

import torch

from moesaic.data.batch import IGNORE_LABEL, Batch
from moesaic.verify.synthetic_batches import SyntheticShape, UnevenBatches, uneven_batch

SHAPE = SyntheticShape(rows=7, length=9)


def rows(batch: Batch) -> list[list[int]]:
    sides = (batch.source.values, batch.target.values, batch.labels)
    both = torch.cat([batch.key[:, None], *sides], 1)
    return sorted(both.tolist())


def test_the_shards_of_a_batch_are_the_batch() -> None:
    for number in range(1, 7):
        whole = UnevenBatches(SHAPE, seed=3)
        parts = [UnevenBatches(SHAPE, seed=3, shard=part, num_shards=4) for part in range(4)]
        for stream in (whole, *parts):
            stream.restore({"drawn": number - 1})
        assert rows(next(whole)) == sorted(row for part in parts for row in rows(next(part)))


def test_some_shards_have_no_row() -> None:
    streams = [UnevenBatches(SHAPE, seed=3, shard=part, num_shards=4) for part in range(4)]
    counts = [[next(stream).rows for stream in streams] for _ in range(3)]
    assert min(map(min, counts)) == 0
    assert min(map(max, counts)) > 0


def test_rows_have_many_lengths_and_padding_is_not_predicted() -> None:
    batch = uneven_batch(SHAPE, rows=20, seed=1)
    assert len(set(batch.target.lengths.tolist())) > 4
    assert not ((batch.labels != IGNORE_LABEL) & ~batch.target.real).any()
    assert batch.num_predicted > 0


def test_without_an_encoder_there_is_no_source_and_the_prompt_is_not_predicted() -> None:
    batch = uneven_batch(SyntheticShape(rows=7, length=9, source=False), rows=20, seed=1)
    assert batch.source.values.shape == (20, 0)
    assert (batch.labels[:, 0] == IGNORE_LABEL).any()
    assert (batch.labels[:, 0] != IGNORE_LABEL).any()


def test_another_seed_gives_other_batches() -> None:
    assert rows(next(UnevenBatches(SHAPE, seed=1))) != rows(next(UnevenBatches(SHAPE, seed=2)))
