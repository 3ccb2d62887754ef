"""One rank's counts are the counts, and its rows are all rows."""

import torch

from moesaic.moe.batch_group import BatchGroup, SingleRankBatch


def test_what_one_rank_counts_is_global():
    counts = torch.tensor([1, 2])
    assert SingleRankBatch().sum(counts) is counts
    assert isinstance(SingleRankBatch(), BatchGroup)


def test_what_one_rank_gathers_is_its_own():
    rows = torch.arange(6).view(3, 2)
    gathered = SingleRankBatch().gather(rows)
    assert gathered.rows is rows
    assert gathered.start == 0
