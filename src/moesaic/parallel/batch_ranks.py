"""BatchRanks: the ranks that share a batch, as MoE layers ask for them (``moe/batch_group.py``)."""

import torch

from moesaic.core.config import Choice
from moesaic.core.shapes import Int, Shaped, Tensor
from moesaic.distributed.mesh import STAGE_AXES, Mesh
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess, World
from moesaic.moe.batch_group import GatheredRows


class BatchRanks:
    """Every rank of ``world`` holds a part of the same batch.

    ``room`` are those whose tokens compete for the room of an expert; all of them by default.
    """

    def __init__(self, world: World, *, capacity_world: World | None = None) -> None:
        self._world, self._capacity_world = world, capacity_world or world

    def sum(self, counts: Shaped[Tensor, "C"]) -> Shaped[Tensor, "C"]:
        return self._world.all_reduce(counts)

    def gather(self, rows: Int[Tensor, "N C"]) -> GatheredRows:
        room = self._capacity_world
        if room.size == 1:
            return GatheredRows(rows, 0)
        own = torch.tensor([rows.shape[0]], device=rows.device)
        sizes = [int(size) for size in room.all_gather(own)]
        padded = rows.new_zeros(max(sizes), rows.shape[1])
        padded[: rows.shape[0]] = rows
        parts = room.all_gather(padded)
        whole = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return GatheredRows(whole, sum(sizes[: room.rank]))


class CapacityScope(Choice):
    """Family: whose tokens compete for the room of an expert, where that is limited."""

    def world(self, mesh: Mesh, *, experts: int) -> World:
        """Return those ranks, for a layer of so many experts."""
        raise NotImplementedError


class GlobalBatch(CapacityScope):
    """All tokens of the micro-batch: the same edges are dropped under every plan."""

    def world(self, mesh: Mesh, *, experts: int) -> World:
        del experts
        return world_over(mesh, *STAGE_AXES)


class DataParallelRank(CapacityScope):
    """The tokens of the ranks that one set of experts is spread over (2405.15052, table 1).

    In that paper's mesh (data, expert, model) nothing of routing crosses the data axis: neither
    rows nor what decides who is dropped. So another number of rows drops other edges. Losses that
    balance are those of the whole batch all the same.
    """

    def world(self, mesh: Mesh, *, experts: int) -> World:
        return world_over(mesh, "expert", "expert_tensor", experts=experts)


def world_over(mesh: Mesh, *axes: str, experts: int | None = None) -> World:
    """Return the ranks that differ in these axes, as a world of their own."""
    group = mesh.group(*axes, num_experts=experts)
    return (
        SingleProcess(mesh.device) if group is None else ProcessGroupWorld(mesh.device, group=group)
    )
