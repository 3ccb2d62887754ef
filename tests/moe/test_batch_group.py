"""The batch group of one rank returns its inputs."""

import torch

from moesaic.moe.batch_group import BatchGroup, SingleRankBatch


def test_the_sum_over_one_rank_is_its_input():
    counts = torch.tensor([1, 2])
    assert SingleRankBatch().sum(counts) is counts
    assert SingleRankBatch().sum_rows(counts) is counts
    assert isinstance(SingleRankBatch(), BatchGroup)
