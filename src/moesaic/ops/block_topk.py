"""Largest entries of each row by maxima of blocks: what ``topk`` returns, faster on a CPU.

The k largest entries of a row lie in the k blocks of the largest maxima, and maxima are computed
with vector instructions. Block i has the columns i, i + n, i + 2 n, ... of a row.

Letters: R rows, V columns, k entries, n blocks.
"""

from typing import NamedTuple

import torch

from moesaic.core.shapes import Float, Int, Tensor

BLOCK = 16  # columns in a block: measured on rows of 2,048 and 32,000 columns


class Largest(NamedTuple):
    """Entries in falling order, and their columns."""

    values: Float[Tensor, "R k"]
    columns: Int[Tensor, "R k"]


def largest_of_rows(x: Float[Tensor, "R V"], *, count: int) -> Largest:
    """Return the ``count`` largest entries of each row, or all; equal ones come in any order."""
    blocks = x.shape[1] // BLOCK
    if x.device.type != "cpu" or blocks < 2 * count or x.shape[0] * blocks < 1024:
        return Largest(*x.topk(min(count, x.shape[1]), dim=1))
    end = blocks * BLOCK
    maxima = x[:, :end].unflatten(1, (BLOCK, blocks)).amax(1)
    inside = torch.arange(0, end, blocks)
    candidate = (maxima.topk(count, dim=1).indices[:, :, None] + inside).flatten(1)
    if end < x.shape[1]:
        rest = torch.arange(end, x.shape[1]).expand(len(x), -1)
        candidate = torch.cat([candidate, rest], 1)
    values, place = x.gather(1, candidate).topk(count, dim=1)
    return Largest(values, candidate.gather(1, place))
