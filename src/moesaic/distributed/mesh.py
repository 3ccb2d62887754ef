"""Mesh: the process groups of a parallel plan, created once, by every rank in the same order.

A group is named by the axes in which its ranks differ. Two names of the same ranks (an axis of size
1 adds nothing) give one group; a group of one rank is None, with which every collective does
nothing.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.distributed as distributed
from torch.distributed.device_mesh import DeviceMesh

from moesaic.distributed.parallel_plan import ParallelPlan, RankGrid
from moesaic.distributed.process_groups import Group, new_group

STAGE_AXES = ("data", "context", "tensor")
DATA_CONTEXT_AXES = ("data", "context")


class Mesh:
    """The process groups of ``plan`` (with ``data`` filled in). Creating them is collective.

    ``expert_counts`` holds the numbers of experts of the model's layers: each has its own grid.
    Without ``torch.distributed`` the plan must be one of a single rank.
    """

    def __init__(
        self,
        plan: ParallelPlan,
        *,
        rank: int,
        device: torch.device,
        expert_counts: Iterable[int] = (),
        timeout_s: float = 120.0,
    ) -> None:
        self.plan, self.rank, self.device = plan, rank, device
        self.timeout_s = timeout_s
        self._groups: dict[tuple[int, ...], Group] = {}
        self._meshes: dict[tuple[int, ...], DeviceMesh] = {}
        self.dense_grid = RankGrid(plan.axes())
        self._expert_grids = {
            number: RankGrid(plan.axes(num_experts=number)) for number in set(expert_counts)
        }
        single_axes = (("context",), ("tensor",), ("pipe",))
        for axes in (STAGE_AXES, DATA_CONTEXT_AXES, ("context", "tensor"), *single_axes):
            self._axes_group(self.dense_grid, axes)
        for number in sorted(self._expert_grids):
            for axis in ("expert", "expert_tensor", "expert_data"):
                self._axes_group(self._expert_grids[number], (axis,))

    def group(self, *axes: str, num_experts: int | None = None) -> Group:
        """Return this rank's group of the dense axes, or of a layer of ``num_experts``."""
        return self._axes_group(self.grid(num_experts), axes)

    def ranks(self, *axes: str, num_experts: int | None = None) -> tuple[int, ...]:
        """Return the ranks of that group."""
        return self.grid(num_experts).group(self.rank, axes)

    def size(self, *axes: str, num_experts: int | None = None) -> int:
        """Return the number of ranks of that group."""
        return self.grid(num_experts).size(axes)

    def coordinates(self, num_experts: int | None = None) -> dict[str, int]:
        """Return this rank's coordinate on each axis."""
        return self.grid(num_experts).coordinates(self.rank)

    def grid(self, num_experts: int | None = None) -> RankGrid:
        """Return the grid of ranks for dense layers, or for layers of ``num_experts``."""
        return self.dense_grid if num_experts is None else self._expert_grids[num_experts]

    @property
    def expert_counts(self) -> tuple[int, ...]:
        """The numbers of experts of the model's layers."""
        return tuple(sorted(self._expert_grids))

    @property
    def world_group(self) -> Group:
        """The group of all ranks."""
        return None if self.plan.world_size == 1 else cast("Group", distributed.group.WORLD)

    def device_mesh(self, *axes: str, num_experts: int | None = None) -> DeviceMesh:
        """Return torch's one-dimensional mesh of that group, which has more than one rank."""
        ranks = self.ranks(*axes, num_experts=num_experts)
        if ranks not in self._meshes:
            group = self.group(*axes, num_experts=num_experts)
            assert group is not None
            self._meshes[ranks] = DeviceMesh.from_group(
                group, self.device.type, mesh_dim_names=("_".join(axes),)
            )
        return self._meshes[ranks]

    def _axes_group(self, grid: RankGrid, axes: Sequence[str]) -> Group:
        return self.group_of(grid.group(self.rank, axes))

    def group_of(self, ranks: tuple[int, ...]) -> Group:
        """Return the group of these ranks, this one among them; create it if there is none.

        Collective over them alone.
        """
        if len(ranks) == 1:
            return None
        if len(ranks) == self.plan.world_size:
            return self.world_group
        if ranks not in self._groups:
            # only its members create a group: a rank makes as many calls for any number of ranks
            self._groups[ranks] = new_group(ranks, timeout_s=self.timeout_s)
        return self._groups[ranks]
