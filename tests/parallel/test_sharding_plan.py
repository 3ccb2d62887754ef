"""Slices of tensors, and their description as shards."""

import torch

from moesaic.parallel.sharding_plan import describe_shard, slice_local


def test_a_slice_may_be_empty() -> None:
    full = torch.arange(6.0).view(2, 3)
    part = slice_local(full, ((), ((0, 3),)))
    assert part.shape == (0, 3)
    assert describe_shard(part, ((), ((0, 3),)), shape=(2, 3)).blocks == ()


def test_separate_spans_are_concatenated() -> None:
    full = torch.arange(8.0).view(2, 4)
    assert slice_local(full, (((0, 2),), ((0, 1), (3, 1)))).tolist() == [[0.0, 3.0], [4.0, 7.0]]
