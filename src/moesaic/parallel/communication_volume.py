"""Communication volume: what a rank sends in one training step of a plan.

What layers exchange is measured on fake ranks (``planner/step_cost.py``). Here is what depends on
the shards of a rank alone: gradients, and the weights that ZeRO gathers. The bytes are those that
``distributed/communication_counter.py`` counts: each collective once, by an algorithm that sends no
byte twice. A collective is named by the axes of its ranks ("data+context").
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from moesaic.distributed.world import BUCKET_BYTES
from moesaic.moe.config import MoE
from moesaic.parallel.parameter_inventory import ParameterShard, RankParameters
from moesaic.parallel.precision import Precision

FLOAT64_BYTES = 8
Volumes = Iterator[tuple[str, str, int, int]]  # (kind, axis, bytes, messages)


@dataclass(frozen=True, slots=True)
class CommunicationVolume:
    """Bytes that one rank sends in a step by calls of one kind of collective over one axis."""

    kind: str
    axis: str
    bytes: int
    messages: int = 0


def summed_volumes(lines: Iterable[CommunicationVolume]) -> tuple[CommunicationVolume, ...]:
    """Return the lines with those of the same collective and axis added up, sorted."""
    found: dict[tuple[str, str], CommunicationVolume] = {}
    for each in lines:
        key = each.kind, each.axis
        known = found.get(key, CommunicationVolume(*key, 0))
        size, messages = known.bytes + each.bytes, known.messages + each.messages
        found[key] = CommunicationVolume(*key, size, messages)
    return tuple(found[key] for key in sorted(found))


def routing_statistics_bytes(moe: MoE, *, ranks: int) -> int:
    """Return what a rank sends to sum the statistics of a layer's routing over n ranks."""
    return 2 * (4 * moe.num_router_outputs + 1) * FLOAT64_BYTES * (ranks - 1) // ranks


def gradient_communication(
    rank_parameters: RankParameters, *, precision: Precision, micro_batches: int = 1
) -> tuple[CommunicationVolume, ...]:
    """Return what a rank sends in a step for gradients and ZeRO's parameters, sorted.

    It is an upper bound for ZeRO 3 where nothing is trained before a block: its weights are then
    not gathered for backward.
    """
    sums: Counter[tuple[str, str]] = Counter()
    messages: Counter[tuple[str, str]] = Counter()
    parts = (
        *_zero_sync(rank_parameters, precision, micro_batches=micro_batches),
        *_replica_sync(rank_parameters, precision),
        *_pipeline_sync(rank_parameters, precision),
    )
    for kind, axis, size, calls in parts:
        sums[kind, axis] += size
        messages[kind, axis] += calls
    return tuple(
        CommunicationVolume(*key, size, messages[key]) for key, size in sorted(sums.items()) if size
    )


def _zero_sync(parameters: RankParameters, precision: Precision, *, micro_batches: int) -> Volumes:
    """Yield ZeRO's all-gathers of weights and reduce-scatters of gradients: one a unit."""
    plan, first = parameters.plan, parameters.grid().coordinates(parameters.rank)["tensor"] == 0
    no_gradient = frozenset() if first else parameters.inventory.first_rank_biases
    reductions = 1 if plan.zero == 1 else micro_batches
    seen: set[tuple[str, str]] = set()
    for shard in parameters.shards:
        number, unit = shard.parameter.placement.num_experts, shard.parameter.fsdp_unit
        if not shard.zero_axes:
            continue
        ranks = parameters.num_ranks(shard.zero_axes, num_experts=number)
        size = shard.gathered_values * (ranks - 1)
        held, summed = precision.parameter_dtype.itemsize, precision.reduce_dtype.itemsize
        # parameters outside of blocks stay gathered between forward and backward
        gathers = micro_batches * (2 if unit else 1) if plan.zero == 3 else 1
        axis = parameters.group_name(shard.zero_axes, num_experts=number)
        yield "all-gather", axis, held * size * gathers, gathers * (("gather", unit) not in seen)
        seen.add(("gather", unit))
        if shard.parameter.trained and shard.parameter.name not in no_gradient:
            calls = reductions * (("scatter", unit) not in seen)
            yield "reduce-scatter", axis, summed * size * reductions, calls
            seen.add(("scatter", unit))


@dataclass(frozen=True, slots=True)
class GradientBucket:
    """Gradients that are summed together over the ranks that differ in ``axes``."""

    axes: tuple[str, ...]
    num_experts: int | None
    names: tuple[str, ...]
    bytes: int


def gradient_buckets(parameters: RankParameters, *, precision: Precision) -> list[GradientBucket]:
    """Return the buckets of ``parallel/gradient_sums.py``, in the order in which they fill."""
    held, summed = precision.parameter_dtype.itemsize, precision.reduce_dtype.itemsize
    filling: dict[tuple[int, ...], list[ParameterShard]] = {}
    full: list[list[ParameterShard]] = []
    for shard in reversed(parameters.trained):
        ranks = _ranks_with_copies(parameters, shard)
        if len(ranks) == 1:
            continue
        members = filling.setdefault(ranks, [])
        if members and held * _values([*members, shard]) > BUCKET_BYTES:
            full.append(members)
            members = filling[ranks] = []
        members.append(shard)
    return [
        GradientBucket(
            _axes_with_copies(parameters, members[0]),
            members[0].parameter.placement.num_experts,
            tuple(shard.parameter.name for shard in members),
            summed * _values(members),
        )
        for members in (*full, *filling.values())
    ]


def _values(shards: Sequence[ParameterShard]) -> int:
    return sum(math.prod(shard.shape) for shard in shards)


def _axes_with_copies(parameters: RankParameters, shard: ParameterShard) -> tuple[str, ...]:
    number = shard.parameter.placement.num_experts
    axes = shard.all_reduce_axes
    return tuple(a for a in axes if parameters.num_ranks((a,), num_experts=number) > 1)


def _ranks_with_copies(parameters: RankParameters, shard: ParameterShard) -> tuple[int, ...]:
    grid = parameters.grid(shard.parameter.placement.num_experts)
    return grid.group(parameters.rank, _axes_with_copies(parameters, shard))


def _replica_sync(parameters: RankParameters, precision: Precision) -> Volumes:
    """Yield the sums of gradients over the ranks with copies of a parameter, in buckets."""
    for bucket in gradient_buckets(parameters, precision=precision):
        ranks = parameters.num_ranks(bucket.axes, num_experts=bucket.num_experts)
        axis = parameters.group_name(bucket.axes, num_experts=bucket.num_experts)
        yield "all-reduce", axis, 2 * bucket.bytes * (ranks - 1) // ranks, 1


def _pipeline_sync(parameters: RankParameters, precision: Precision) -> Volumes:
    """Yield the sums of gradients over the stages that hold a parameter together."""
    shared: dict[tuple[int, ...], list[int]] = {}
    for shard in parameters.trained:
        holders = parameters.holders(shard.parameter)
        if len(holders) > 1:
            size = precision.reduce_dtype.itemsize * math.prod(shard.shape)
            shared.setdefault(holders, []).append(size)
    for holders, sizes in shared.items():
        for size in _buckets(sizes):
            yield "all-reduce", "pipe", 2 * size * (len(holders) - 1) // len(holders), 1


def _buckets(sizes: list[int]) -> Iterator[int]:
    """Yield the bucket sizes of ``distributed/world.py``, which sums small gradients together."""
    bucket = 0
    for size in sizes:
        if bucket and bucket + size > BUCKET_BYTES:
            yield bucket
            bucket = 0
        bucket += size
    yield bucket
