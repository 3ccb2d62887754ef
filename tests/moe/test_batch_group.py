"""The batch group of one rank returns its inputs."""

import torch

from moesaic.moe.batch_group import BatchGroup, SingleRankBatch


def test_the_sum_over_one_rank_is_its_input():
    counts = torch.tensor([1, 2])
    assert SingleRankBatch().sum(counts) is counts
    assert isinstance(SingleRankBatch(), BatchGroup)


def test_gathering_over_one_rank_returns_its_rows():
    rows = torch.arange(6).view(3, 2)
    gathered = SingleRankBatch().gather(rows)
    assert gathered.rows is rows
    assert gathered.start == 0
