"""The row loader: its draws, ranks and resuming, on rows that are their own numbers."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest

from moesaic.core.errors import CheckpointError, DataError
from moesaic.data.batch_stream import DataReplica
from moesaic.data.row_loader import RowDataset, RowDraws, RowLoader, draw_rows, held_out_rows

SIZES = np.array([5, 3, 8])


class Numbers(RowDataset):
    """Each batch is its draws."""

    fingerprint, origins = "numbers", ()

    def __init__(self, sizes=SIZES):
        self._sizes, self.labels = np.array(sizes), {"domain": ("a", "b", "c")}

    def sizes(self, split):
        return self._sizes if split == "train" else self._sizes // 2

    def make_batch(self, draws: RowDraws, *, split):
        assert split in ("train", "valid")
        return list(zip(draws.group.tolist(), draws.row.tolist(), draws.key.tolist(), strict=True))


def loader(rank=0, ranks=1, **changes):
    given = {"rows": 4, "seed": 3} | changes
    return RowLoader(Numbers(), replica=DataReplica(rank, ranks), **given)


def test_an_epoch_of_a_group_has_each_of_its_rows_once():
    draws = draw_rows(np.arange(3 * 8 * 5), sizes=SIZES, seed=1)
    for group, size in enumerate(SIZES):
        rows = draws.row[draws.group == group]
        assert len(rows) == 40
        for epoch in np.split(rows[: 40 // size * size], 40 // size):
            assert sorted(epoch) == list(range(size))


def test_a_draw_is_a_function_of_its_number_alone():
    whole = draw_rows(np.arange(50), sizes=SIZES, seed=1)
    part = draw_rows(np.arange(20, 30), sizes=SIZES, seed=1)
    assert part.row.tolist() == whole.row[20:30].tolist()
    assert part.key.tolist() == whole.key[20:30].tolist()


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_share_the_global_batches_whatever_their_number(ranks):
    with loader() as one:
        expected = [sorted(next(one)) for _ in range(3)]
    parts = [loader(rank, ranks) for rank in range(ranks)]
    assert [sorted(chain(*(next(p) for p in parts))) for _ in range(3)] == expected
    held = chain(*(chain(*p.held_out_batches()) for p in parts))
    assert sorted(held) == sorted(chain(*loader().held_out_batches()))


def test_resuming_on_another_number_of_ranks_continues_at_the_next_draw():
    with loader() as one:
        next(one)
        state, expected = one.state(), sorted(next(one))
    parts = [loader(rank, 2, prefetch=0) for rank in range(2)]
    for part in parts:
        part.restore(state)
    assert sorted(chain(*(next(p) for p in parts))) == expected


def test_held_out_rows_are_the_same_in_every_call_and_at_most_so_many_of_a_group():
    draws = held_out_rows(sizes=SIZES, rows=4)
    assert Counter(draws.group.tolist()) == {0: 4, 1: 3, 2: 4}
    assert draws.row.tolist() == held_out_rows(sizes=SIZES, rows=4).row.tolist()


def test_a_position_of_other_data_is_refused():
    state = loader().state()
    with pytest.raises(CheckpointError, match="other data, another seed"):
        loader(seed=4).restore(state)
    with pytest.raises(CheckpointError, match="first"):
        loader().restore(state | {"first": -1})


def test_a_group_without_training_rows_is_refused():
    with pytest.raises(DataError, match="one or more"):
        RowLoader(Numbers([2, 0]), rows=4, seed=1)


def test_a_split_that_is_not_held_out_is_refused():
    loader = RowLoader(Numbers(), rows=8, seed=1, prefetch=0)
    with pytest.raises(DataError, match='no split "news": its held-out rows are valid and test'):
        next(loader.held_out_batches("news"))
