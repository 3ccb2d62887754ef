"""BatchRanks: the ranks of a world, as MoE layers ask for them (``moe/ranks.py``)."""

import torch

from moesaic.core.shapes import Int, Shaped, Tensor
from moesaic.dist.world import World
from moesaic.moe.ranks import Gathered


class BatchRanks:
    """Every rank of ``world`` holds a part of the same batch."""

    def __init__(self, world: World) -> None:
        self._world = world

    def sum(self, counts: Shaped[Tensor, "C"]) -> Shaped[Tensor, "C"]:
        return self._world.sum(counts)

    def gather(self, rows: Int[Tensor, "N C"]) -> Gathered:
        if self._world.size == 1:
            return Gathered(rows, 0)
        own = torch.tensor([rows.shape[0]], device=rows.device)
        sizes = [int(size) for size in self._world.gather(own)]
        padded = rows.new_zeros(max(sizes), rows.shape[1])
        padded[: rows.shape[0]] = rows
        parts = self._world.gather(padded)
        whole = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return Gathered(whole, sum(sizes[: self._world.rank]))
