"""Groups: edges sorted by expert, so that each expert's rows are one contiguous segment.

Letters: N edges, E experts.
"""

from dataclasses import dataclass

import torch

from moesaic.core.shapes import Int, Tensor


@dataclass(frozen=True, slots=True)
class RowGroups:
    """``order[j]`` is the edge at sorted place j, ``place`` its inverse: ``place[order[j]] == j``.

    ``counts[e]`` edges lead to expert e and ``ends`` is their running sum (int32, what
    ``grouped_mm`` wants). Edges that lead nowhere are sorted last, past ``ends[-1]``.
    """

    order: Int[Tensor, "N"]
    inverse: Int[Tensor, "N"]
    rows_per_expert: Int[Tensor, "E"]
    offsets: Int[Tensor, "E"]


def group_by_expert(expert: Int[Tensor, "N"], *, num_experts: int) -> RowGroups:
    """Sort edges by expert, stably; ``num_experts`` as an expert means dropped.

    N stays what it was (dropped edges keep a place), so nothing waits for the device.
    """
    by_expert, order = expert.sort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    # not bincount, which waits for a GPU to learn the largest value
    every = torch.arange(num_experts, device=expert.device, dtype=expert.dtype)
    ends = torch.searchsorted(by_expert, every, right=True)
    counts = ends.diff(prepend=ends.new_zeros(1))
    return RowGroups(order, place, counts, ends.to(torch.int32))
