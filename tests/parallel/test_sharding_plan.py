"""Slices: a rank's part of a tensor."""

import torch

from moesaic.parallel.sharding_plan import describe_shard, slice_local


def test_a_rank_may_hold_no_row_of_a_matrix() -> None:
    whole = torch.arange(6.0).view(2, 3)
    part = slice_local(whole, ((), ((0, 3),)))
    assert part.shape == (0, 3)
    assert describe_shard(part, ((), ((0, 3),)), shape=(2, 3)).blocks == ()


def test_runs_that_lie_apart_stand_side_by_side() -> None:
    whole = torch.arange(8.0).view(2, 4)
    assert slice_local(whole, (((0, 2),), ((0, 1), (3, 1)))).tolist() == [[0.0, 3.0], [4.0, 7.0]]
