"""Communication volume: what a rank sends for gradients and parameters, in closed form.

What it sends for activations is measured (``planner/step_cost.py``). The bytes are those that
``distributed/communication_counter.py`` counts: each collective once, by an algorithm that sends
no byte twice. A collective is named by the axes of its ranks ("data+context").
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from moesaic.distributed.world import BUCKET_BYTES
from moesaic.parallel.parameter_inventory import RankParameters
from moesaic.parallel.precision import Precision

Volumes = Iterator[tuple[str, str, int, int]]  # (kind, axis, bytes, messages)


@dataclass(frozen=True, slots=True)
class CommunicationVolume:
    """Bytes that one rank sends in a step by calls of one kind of collective over one axis."""

    kind: str
    axis: str
    bytes: int
    messages: int = 0


@dataclass(frozen=True, slots=True)
class DispatchedTokens:
    """What a rank dispatches in a layer: ``tokens`` rows of ``dim`` numbers, each to k experts."""

    tokens: int
    experts_per_token: int
    dim: int
    itemsize: int

    @property
    def total_bytes(self) -> float:
        """Bytes of one copy of a row for each of its experts."""
        return float(self.tokens * self.experts_per_token * self.dim * self.itemsize)


def all_to_all_bytes(tokens: DispatchedTokens, *, ranks: int) -> float:
    """Return the bytes of dispatch and combine over n ranks: ``2 k (n-1)/n`` rows per token."""
    return 2 * tokens.total_bytes * (ranks - 1) / ranks


def expert_tensor_bytes(tokens: DispatchedTokens, *, expert_tensor: int) -> float:
    """Return the bytes of the all-gather over an expert's slices and the reduce-scatter back."""
    return 2 * tokens.total_bytes * (expert_tensor - 1)


def gradient_communication(
    rank_parameters: RankParameters, *, precision: Precision, micro_batches: int = 1
) -> tuple[CommunicationVolume, ...]:
    """Return what a rank sends in a step for gradients and ZeRO's parameters, sorted."""
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
        gathers = micro_batches * (2 if plan.zero == 3 and unit else 1)
        axis = parameters.group_name(shard.zero_axes, num_experts=number)
        yield "all-gather", axis, held * size * gathers, gathers * (("gather", unit) not in seen)
        seen.add(("gather", unit))
        if shard.parameter.name not in no_gradient:
            calls = reductions * (("scatter", unit) not in seen)
            yield "reduce-scatter", axis, summed * size * reductions, calls
            seen.add(("scatter", unit))


def largest_bucket_bytes(parameters: RankParameters, *, precision: Precision) -> int:
    """Return the bytes of the largest bucket of gradients that are summed over ranks."""
    groups = _replicated_gradients(parameters, precision).values()
    return max((size for sizes in groups for size in _buckets(sizes)), default=0)


def _replicated_gradients(
    parameters: RankParameters, precision: Precision
) -> dict[tuple[tuple[str, ...], int | None], list[int]]:
    """Return the bytes of gradients by the axes over which they are summed."""
    summed: dict[tuple[tuple[str, ...], int | None], list[int]] = {}
    for shard in parameters.shards:
        number = shard.parameter.placement.num_experts
        axes = tuple(
            a for a in shard.all_reduce_axes if parameters.num_ranks((a,), num_experts=number) > 1
        )
        if axes:
            sizes = summed.setdefault((axes, number), [])
            sizes.append(precision.reduce_dtype.itemsize * math.prod(shard.shape))
    return summed


def _replica_sync(parameters: RankParameters, precision: Precision) -> Volumes:
    """Yield the sums of gradients over the ranks with copies of a parameter, in buckets."""
    for (axes, number), sizes in _replicated_gradients(parameters, precision).items():
        ranks = parameters.num_ranks(axes, num_experts=number)
        axis = parameters.group_name(axes, num_experts=number)
        for size in _buckets(sizes):
            yield "all-reduce", axis, 2 * size * (ranks - 1) // ranks, 1


def _pipeline_sync(parameters: RankParameters, precision: Precision) -> Volumes:
    """Yield the sums of gradients over the stages that hold a parameter together."""
    shared: dict[tuple[int, ...], list[int]] = {}
    for shard in parameters.shards:
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
