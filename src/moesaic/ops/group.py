"""Groups: edges sorted by expert, so that each expert's rows are one contiguous segment.

Letters: N edges, E experts.
"""

from dataclasses import dataclass

import torch

from moesaic.core.shapes import Int, Tensor


@dataclass(frozen=True, slots=True)
class Groups:
    """``order[j]`` is the edge at sorted place j, ``place`` its inverse: ``place[order[j]] == j``.

    ``counts[e]`` edges lead to expert e and ``ends`` is their running sum (int32, what
    ``grouped_mm`` wants). Edges that lead nowhere are sorted last, past ``ends[-1]``.
    """

    order: Int[Tensor, "N"]
    place: Int[Tensor, "N"]
    counts: Int[Tensor, "E"]
    ends: Int[Tensor, "E"]


def group(expert: Int[Tensor, "N"], *, num_experts: int) -> Groups:
    """Sort edges by expert, stably; ``num_experts`` as an expert means dropped.

    N stays what it was (dropped edges keep a place), so nothing waits for the device.
    """
    order = expert.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    counts = torch.bincount(expert, minlength=num_experts + 1)[:num_experts]
    return Groups(order, place, counts, counts.cumsum(0).to(torch.int32))
