"""Batch ranks: the ranks that share a batch, and the scope in which expert capacity is counted."""

from typing import ClassVar

import torch

from moesaic.core.config import Choice
from moesaic.core.shapes import Int, Shaped, Tensor
from moesaic.distributed.mesh import Mesh
from moesaic.distributed.process_groups import Group
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess, World
from moesaic.moe.batch_group import GatheredRows


class BatchRanks:
    """The ``BatchGroup`` of an MoE layer whose batch is sharded over the ranks of ``world``.

    Tokens of the ranks in ``capacity_world`` compete for expert capacity; by default all do.
    """

    def __init__(self, world: World, *, capacity_world: World | None = None) -> None:
        self._world, self._capacity_world = world, capacity_world or world

    def sum(self, counts: Shaped[Tensor, "C"]) -> Shaped[Tensor, "C"]:
        return self._world.all_reduce(counts)

    def gather(self, rows: Int[Tensor, "N C"]) -> GatheredRows:
        world = self._capacity_world
        if world.size == 1:
            return GatheredRows(rows, 0)
        count = torch.tensor([rows.shape[0]], device=rows.device)
        sizes = [int(size) for size in world.all_gather(count)]
        padded = rows.new_zeros(max(sizes), rows.shape[1])
        padded[: rows.shape[0]] = rows
        parts = world.all_gather(padded)
        gathered = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return GatheredRows(gathered, sum(sizes[: world.rank]))


class CapacityScope(Choice):
    """Family: the tokens that compete for the limited capacity of an expert.

    ``expert_axes`` are the axes of the ranks that hold them; empty: all ranks that share the batch.
    """

    expert_axes: ClassVar[tuple[str, ...]] = ()


class GlobalBatch(CapacityScope):
    """All tokens of the micro-batch: the same edges are dropped under every plan."""


class DataParallelRank(CapacityScope):
    """The tokens of the ranks that share one set of experts (2405.15052, table 1).

    In that paper's mesh (data, expert, model) no routing data crosses the data axis, neither rows
    nor the counts that decide which edges are dropped, so the dropped edges depend on the data
    parallel degree. Balance losses are those of the whole batch in either scope.
    """

    expert_axes = ("expert", "expert_tensor")


def world_over(mesh: Mesh, *axes: str, num_experts: int | None = None) -> World:
    """Return the ranks that differ in these axes only, as a ``World``."""
    return group_world(mesh.group(*axes, num_experts=num_experts), device=mesh.device)


def group_world(group: Group, *, device: torch.device) -> World:
    """Return the ranks of a process group as a ``World``; None: this process alone."""
    return SingleProcess(device) if group is None else ProcessGroupWorld(device, group=group)
