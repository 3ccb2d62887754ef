"""Owner update: the products and messages of an optimizer that updates whole matrices.

Each matrix has one owner among the ranks that hold it (``parallel/matrix_owners.py``). Counted is a
rank's mean share: summed over ranks it is the work of all owners, and owners are balanced by FLOPs.
Bytes are at most this: of a fused matrix that is cut unevenly, an owner may have most of a map.

Letters: S ranks that hold the slices of one copy, R copies.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import nn

from moesaic.distributed.simulation import SimulatedRank
from moesaic.optim.optimizer import Muon, Optimizer
from moesaic.optim.update_rules import MuonRule, newton_schulz
from moesaic.parallel.communication_volume import CommunicationVolume
from moesaic.parallel.parameter_inventory import ParameterShard, RankParameters
from moesaic.parallel.sharding_plan import zero_dim
from moesaic.planner.operation_recorder import Operation, OperationKind, OperationRecorder

FLOAT32_BYTES = 4  # of the momentum's direction, which is what ranks send


@dataclass(frozen=True, slots=True)
class _OwnedMatrices:
    """A parameter's ``stack`` of matrices, each of these maps, and the axes of those who hold it.

    ``shape`` is that of a whole matrix.
    """

    stack: int
    shape: tuple[int, int]
    maps: tuple[tuple[int, int], ...]
    steps: int
    slice_axes: tuple[str, ...]
    copy_axes: tuple[str, ...]
    num_experts: int | None

    @property
    def bytes(self) -> int:
        return FLOAT32_BYTES * self.stack * math.prod(self.shape)


def owner_operations(
    parameters: RankParameters, optimizer: Optimizer
) -> Iterator[tuple[Operation, int]]:
    """Yield the products of a rank's share of the updates, and how often each is done.

    Matrices of one shape are one batch, as in the optimizer.
    """
    parts: dict[tuple[int, int, int], float] = {}
    for each in _owned_matrices(parameters, optimizer):
        axes = (*each.slice_axes, *each.copy_axes)
        owners = parameters.num_ranks(axes, num_experts=each.num_experts)
        for rows, columns in each.maps:
            key = (rows, columns, each.steps)
            parts[key] = parts.get(key, 0.0) + each.stack / owners
    for key, number in parts.items():
        for operation, times in _products_of(*key).items():
            yield (
                replace(
                    operation,
                    flops=round(number * operation.flops),
                    bytes_read=round(number * operation.bytes_read),
                    bytes_written=round(number * operation.bytes_written),
                ),
                times,
            )


def owner_communication(
    parameters: RankParameters, optimizer: Optimizer
) -> tuple[CommunicationVolume, ...]:
    """Return what a rank sends, in the mean: slices to owners and back, and copies."""
    sizes: dict[tuple[str, str], float] = {}
    for each in _owned_matrices(parameters, optimizer):
        experts = each.num_experts
        slices = parameters.num_ranks(each.slice_axes, num_experts=experts)
        copies = parameters.num_ranks(each.copy_axes, num_experts=experts)
        share = each.bytes / slices
        for kind, axes, size in (
            ("all-to-all", each.slice_axes, 2 * share * (slices - 1) / slices / copies),
            ("broadcast", each.copy_axes, share * (copies - 1) / copies),
        ):
            key = kind, parameters.group_name(axes, num_experts=experts)
            sizes[key] = sizes.get(key, 0.0) + size
    return tuple(
        CommunicationVolume(kind, axis, round(size), 2 if kind == "all-to-all" else 1)
        for (kind, axis), size in sorted(sizes.items())
        if size
    )


def _owned_matrices(parameters: RankParameters, optimizer: Optimizer) -> Iterator[_OwnedMatrices]:
    if not isinstance(optimizer, Muon):
        return
    fused = parameters.inventory.fused_outputs
    for shard in parameters.trained:
        parameter = nn.Parameter(torch.empty(shard.shape, device="meta"))
        rule = optimizer.param_group(parameter, kind=shard.parameter.kind)["rule"]
        if isinstance(rule, MuonRule):
            yield _matrices_of(shard, rule, parameters, fused=fused)


def _matrices_of(
    shard: ParameterShard,
    rule: MuonRule,
    parameters: RankParameters,
    *,
    fused: Mapping[str, tuple[int, ...]],
) -> _OwnedMatrices:
    placement, first = shard.parameter.placement, len(shard.shape) - 2
    rows, columns = placement.shape[-2:]
    widths = fused.get(shard.parameter.name) or ((columns if first else rows),)
    zero = shard.zero_axes
    if zero:
        ranks = parameters.num_ranks(zero, num_experts=placement.num_experts)
        zero = zero if zero_dim(shard.shape_before_zero, ranks=ranks) >= first else ()
    sharded = tuple(each.axis for each in placement.sharded_dims if each.dim >= first)
    return _OwnedMatrices(
        stack=shard.shape[0] if first else 1,
        shape=(rows, columns),
        maps=tuple((rows, width) if first else (width, columns) for width in widths),
        steps=rule.steps,
        slice_axes=(*sharded, *zero),
        copy_axes=shard.all_reduce_axes,
        num_experts=placement.num_experts,
    )


@cache
def _products_of(rows: int, columns: int, steps: int) -> Mapping[Operation, int]:
    """Return the products that orthogonalize one matrix."""
    recorder = OperationRecorder()
    with SimulatedRank(recorder):
        newton_schulz(torch.empty(1, rows, columns), steps=steps)
    return {o: n for o, n in recorder.counts.items() if o.kind is not OperationKind.MEMORY}
