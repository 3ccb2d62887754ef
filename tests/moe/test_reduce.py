"""One rank's counts are the counts."""

import torch

from moesaic.moe.reduce import LocalReduce, Reduce


def test_local_counts_are_global():
    counts = torch.tensor([1, 2])
    assert LocalReduce()(counts) is counts
    assert isinstance(LocalReduce(), Reduce)
