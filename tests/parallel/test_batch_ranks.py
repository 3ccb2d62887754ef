"""Rows of all ranks come together in rank order, however many each has."""

import torch

from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess
from moesaic.moe.batch_group import BatchGroup as MoERanks
from moesaic.parallel.batch_ranks import BatchRanks


def _gather(sizes):
    world = ProcessGroupWorld()
    rows = torch.full((sizes[world.rank], 2), world.rank)
    gathered = BatchRanks(world).gather(rows)
    return gathered.rows[:, 0].tolist(), gathered.start


def test_uneven_rows_are_gathered_in_rank_order():
    results = run_on_ranks(3, _gather, [2, 0, 1])
    assert [rows for rows, _ in results] == [[0, 0, 2]] * 3
    assert [start for _, start in results] == [0, 2, 2]


def test_one_rank_gathers_nothing():
    ranks, rows = BatchRanks(SingleProcess()), torch.ones(3, 2, dtype=torch.long)
    assert isinstance(ranks, MoERanks)
    assert ranks.gather(rows).rows is rows
