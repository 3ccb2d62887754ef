"""The largest entries by maxima of blocks are those of ``topk``."""

import pytest
import torch

from moesaic.ops.block_topk import largest_of_rows


@pytest.mark.parametrize(
    ("rows", "columns", "count"),
    [(128, 2048, 8), (40, 515, 2), (300, 97, 3), (1, 5, 8), (2, 700, 9)],
)
def test_the_largest_entries_are_those_of_topk(rows, columns, count):
    x = torch.randn(rows, columns).masked_fill(torch.rand(rows, columns) < 0.2, float("-inf"))
    found, wanted = largest_of_rows(x, count=count), x.topk(min(count, columns), dim=1)
    assert torch.equal(found.values, wanted.values)
    assert torch.equal(x.gather(1, found.columns), found.values)


def test_entries_that_are_equal_are_each_found_once():
    x = torch.zeros(64, 512)
    columns = largest_of_rows(x, count=6).columns
    assert all(len(set(row.tolist())) == 6 for row in columns)
