"""Seeded defects: errors of real systems, inserted on several ranks only."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as distributed
from torch.distributed.fsdp import FSDPModule

from moesaic.distributed.mesh import Mesh
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.distributed.world import ProcessGroupWorld
from moesaic.moe import layer as moe_layer
from moesaic.moe.batch_group import SingleRankBatch
from moesaic.moe.router_context import TokenContext
from moesaic.moe.routing_record import RoutingRecord
from moesaic.optim.gradient_clipping import GradNorm
from moesaic.optim.gradients import Gradients
from moesaic.parallel.batch_ranks import BatchRanks
from moesaic.parallel.gradient_sums import GradientSums
from moesaic.parallel.parallel_model import ParallelModel
from moesaic.parallel.sharding_plan import Placement

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Defect:
    """``seed`` inserts the defect; under ``plan`` the measure ``shows`` exceeds its tolerance."""

    seed: Callable[[Patch], None]
    plan: ParallelPlan
    shows: str


def gradients_averaged(patch: Patch) -> None:
    summed = GradientSums.finish

    def averaged(self: GradientSums, gradients: Gradients) -> None:
        summed(self, gradients)
        for bucket in self._buckets:
            for each in bucket.members:
                assert each.parameter.grad is not None
                each.parameter.grad /= len(bucket.ranks)

    patch.setattr(GradientSums, "finish", averaged)


def zero_averages(patch: Patch) -> None:
    patch.setattr(FSDPModule, "set_gradient_divide_factor", lambda *_: None)
    patch.setattr(FSDPModule, "set_force_sum_reduction_for_comms", lambda *_: None)


def aux_loss_counted_twice(patch: Patch) -> None:
    def twice(*arguments: Any, **named: Any) -> RoutingRecord:
        record = RoutingRecord(*arguments, **named)
        times = distributed.get_world_size() if distributed.is_initialized() else 1
        return replace(record, losses={n: times * loss for n, loss in record.losses.items()})

    patch.setattr(moe_layer, "RoutingRecord", twice)


def axis_not_summed(patch: Patch) -> None:
    axes = Placement.replicated_axes.fget
    assert axes is not None

    def without_tensor(self: Placement) -> tuple[str, ...]:
        return tuple(axis for axis in axes(self) if axis != "tensor")

    patch.setattr(Placement, "replicated_axes", property(without_tensor))


def capacity_of_local_tokens(patch: Patch) -> None:
    patch.setattr(BatchRanks, "keep_first", SingleRankBatch.keep_first)


def norm_counts_copies(patch: Patch) -> None:
    clip = ParallelModel.clip_gradients

    def counted(self: ParallelModel, max_norm: float) -> GradNorm:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Mesh, "size", lambda *_, **__: 1)
            return clip(self, max_norm)

    patch.setattr(ParallelModel, "clip_gradients", counted)


def chance_by_rank(patch: Patch) -> None:
    key = TokenContext.random_key  # of every draw

    def moved(self: TokenContext, name: str) -> torch.Tensor:
        drawn = key(self, name)
        return drawn.roll(distributed.get_rank() if distributed.is_initialized() else 0, 0)

    patch.setattr(TokenContext, "random_key", moved)


def loss_by_local_count(patch: Patch) -> None:
    summed = ProcessGroupWorld.all_reduce

    def local(self: ProcessGroupWorld, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * self.size if tensor.ndim == 0 else summed(self, tensor)

    patch.setattr(ProcessGroupWorld, "all_reduce", local)


DATA, TENSOR = ParallelPlan(data=2), ParallelPlan(data=1, tensor=2)
DEFECTS = {
    "gradients averaged over ranks": Defect(gradients_averaged, DATA, "gradient"),
    "ZeRO averages gradients": Defect(zero_averages, DATA.replace(zero=2), "gradient"),
    "aux loss counted once per rank": Defect(aux_loss_counted_twice, DATA, "metrics"),
    "an axis that is not summed": Defect(axis_not_summed, TENSOR, "gradient"),
    "capacity from a rank's own tokens": Defect(capacity_of_local_tokens, DATA, "expert_counts"),
    "copies counted in the norm": Defect(norm_counts_copies, TENSOR, "norm"),
    "random numbers of the rank": Defect(chance_by_rank, DATA, "loss"),
    "loss divided by a guess of the count": Defect(loss_by_local_count, DATA, "metrics"),
}
