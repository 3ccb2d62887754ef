"""Batch ranks: the ranks that share a batch, and the scope in which expert capacity is counted."""

from dataclasses import replace
from typing import ClassVar

import torch

from moesaic.core.config import Choice
from moesaic.core.shapes import Bool, Int, Shaped, Tensor
from moesaic.distributed.mesh import STAGE_AXES, Mesh
from moesaic.distributed.process_groups import Group
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess, World
from moesaic.moe.edge_queues import (
    CapacityOf,
    QueuedEdges,
    keep_first,
    keep_first_of_rows,
    keep_first_over_ranks,
)


class CapacityScope(Choice):
    """Family: the tokens that compete for the limited capacity of an expert.

    The scope has its part of the capacity: of N edges in it, an expert takes ``factor * N / E``.
    ``axes`` are those of the ranks that hold its tokens, of dense layers or, where ``of_experts``,
    of an MoE layer.
    """

    axes: ClassVar[tuple[str, ...]] = STAGE_AXES
    of_experts: ClassVar[bool] = False
    by_row: ClassVar[bool] = False


class GlobalBatch(CapacityScope):
    """All tokens of the micro-batch: the same edges are dropped under every plan."""


class DataParallelRank(CapacityScope):
    """The tokens of the ranks that share one set of experts (2405.15052, table 1).

    In that paper's mesh (data, expert, model) no routing data crosses the data axis, neither rows
    nor the counts that decide which edges are dropped, so the dropped edges depend on the data
    parallel degree. Balance losses are those of the whole batch in every scope.
    """

    axes = ("expert", "expert_tensor")
    of_experts = True


class LocalGroup(CapacityScope):
    """The tokens of one data rank: a group of GShard (2006.16668), as DeepSpeed counts capacity.

    Context and tensor ranks that share its rows count together. Which edges are dropped depends on
    the data parallel degree and on the micro-batches.
    """

    axes = ("context", "tensor")


class EachRow(CapacityScope):
    """The tokens of one row of the batch: the same edges are dropped in any batch and any plan."""

    axes = ("context", "tensor")
    by_row = True


class BatchRanks:
    """The ``BatchGroup`` of an MoE layer whose batch is sharded over the ranks of ``world``.

    Ranks of ``row_world`` hold tokens of the same rows. Expert capacity is that of ``scope``, whose
    tokens the ranks of ``capacity_world`` hold.
    """

    def __init__(
        self,
        world: World,
        *,
        row_world: World | None = None,
        capacity_world: World | None = None,
        scope: CapacityScope = GlobalBatch(),  # noqa: B008
    ) -> None:
        self._world, self._capacity_world = world, capacity_world or world
        self._row_world, self._scope = row_world, scope

    def sum(self, counts: Shaped[Tensor, "C"]) -> Shaped[Tensor, "C"]:
        return self._world.all_reduce(counts)

    def sum_rows(self, counts: Shaped[Tensor, "B C"]) -> Shaped[Tensor, "B C"]:
        return counts if self._row_world is None else self._row_world.all_reduce(counts)

    def keep_first(self, edges: QueuedEdges, *, capacity: CapacityOf) -> Bool[Tensor, "N"]:
        world = self._capacity_world
        if self._scope.by_row:
            return self._keep_first_of_rows(edges, capacity=capacity)
        if world.size == 1:
            return keep_first(edges, capacity=capacity)
        return keep_first_over_ranks(edges, capacity=capacity, world=world)

    def _keep_first_of_rows(self, edges: QueuedEdges, *, capacity: CapacityOf) -> Bool[Tensor, "N"]:
        """Gather the edges of the few ranks that share rows: their number is not that of ranks."""
        local = torch.stack([edges.expert, edges.row], 1)
        rows, start = _gather(torch.cat([local, edges.key], 1), world=self._capacity_world)
        whole = replace(edges, expert=rows[:, 0], row=rows[:, 1], key=rows[:, 2:])
        kept = keep_first_of_rows(whole, capacity=capacity)
        return kept[start : start + len(local)]


def _gather(rows: Int[Tensor, "N C"], *, world: World) -> tuple[Int[Tensor, "M C"], int]:
    """Return the rows of all ranks in rank order, and the index of this rank's first row."""
    if world.size == 1:
        return rows, 0
    count = torch.tensor([rows.shape[0]], device=rows.device)
    sizes = [int(size) for size in world.all_gather(count)]
    padded = rows.new_zeros(max(sizes), rows.shape[1])
    padded[: rows.shape[0]] = rows
    parts = world.all_gather(padded)
    gathered = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return gathered, sum(sizes[: world.rank])


def world_over(mesh: Mesh, *axes: str, num_experts: int | None = None) -> World:
    """Return the ranks that differ in these axes only, as a ``World``."""
    return group_world(mesh.group(*axes, num_experts=num_experts), device=mesh.device)


def group_world(group: Group, *, device: torch.device) -> World:
    """Return the ranks of a process group as a ``World``; None: this process alone."""
    return SingleProcess(device) if group is None else ProcessGroupWorld(device, group=group)
