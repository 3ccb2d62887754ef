"""Communication volume: what a rank sends in one training step of a plan, in closed form.

Routing is taken as even. The bytes are those that ``distributed/communication_counter.py`` counts:
each collective once, by an algorithm that sends no byte twice. A collective is named by the axes of
its ranks ("data+context").
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from moesaic.core.errors import UserError
from moesaic.distributed.mesh import STAGE_AXES
from moesaic.distributed.world import BUCKET_BYTES
from moesaic.model.parameter_flop_count import BatchDims
from moesaic.moe.config import MoE
from moesaic.parallel.parameter_inventory import ParameterShard, RankParameters
from moesaic.parallel.precision import Float32, Precision

INT64_BYTES = FLOAT64_BYTES = 8
Volumes = Iterator[tuple[str, str, int, int]]  # (kind, axis, bytes, messages)
ActivationVolumes = Iterator[tuple[str, str, float]]  # (kind, axis, bytes)


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


def routing_statistics_bytes(moe: MoE, *, ranks: int) -> int:
    """Return what a rank sends to sum the statistics of a layer's routing over n ranks."""
    return 2 * (4 * moe.num_router_outputs + 1) * FLOAT64_BYTES * (ranks - 1) // ranks


def communication_volume(
    rank_parameters: RankParameters,
    *,
    sizes: BatchDims,
    precision: Precision | None = None,
    micro_batches: int = 1,
) -> tuple[CommunicationVolume, ...]:
    """Return what a rank sends in a step of ``micro_batches`` of these sizes, in closed form.

    Activations are those of Ulysses and of the plain all-to-all, with even routing; what is sent
    under any other choice is measured (``planner/step_cost.py``), which takes longer.
    """
    precision = precision or Float32()
    sums: Counter[tuple[str, str]] = Counter()
    activations = _ActivationVolume(rank_parameters, precision.compute_dtype.itemsize)
    for kind, axis, size in activations.forward_backward(sizes):
        sums[kind, axis] += round(micro_batches * size)
    for line in gradient_communication(
        rank_parameters, precision=precision, micro_batches=micro_batches
    ):
        sums[line.kind, line.axis] += line.bytes
    return tuple(CommunicationVolume(*key, size) for key, size in sorted(sums.items()) if size)


def tokens_per_rank(rank_parameters: RankParameters, sizes: BatchDims) -> tuple[int, int]:
    """Return the source and target tokens that a rank holds. Raises UserError if uneven."""
    ranks = rank_parameters.plan.context * rank_parameters.plan.tensor
    source = sizes.rows * sizes.source if rank_parameters.inventory.config.encoder.layers else 0
    target = sizes.rows * sizes.target
    if source % ranks or target % ranks:
        raise UserError(
            f"{source} source and {target} target tokens do not divide by the {ranks} ranks of "
            "context x tensor, but estimates need equally many on each: choose other rows"
        )
    return source // ranks, target // ranks


@dataclass(frozen=True, slots=True)
class _ActivationVolume:
    """Volumes of the collectives in forward and backward of one micro-batch."""

    parameters: RankParameters
    itemsize: int

    @property
    def _row_bytes(self) -> int:
        """Bytes of one hidden state to all other tensor ranks."""
        config = self.parameters.inventory.config
        return (self.parameters.plan.tensor - 1) * config.dim * self.itemsize

    def forward_backward(self, sizes: BatchDims) -> ActivationVolumes:
        config, plan = self.parameters.inventory.config, self.parameters.plan
        source, target = tokens_per_rank(self.parameters, sizes)
        for side, tokens in (("encoder", source), ("decoder", target)):
            stack, shape = config.stack_of(side), config.mixer_shape(side)
            layers, mixers = range(stack.layers), config.mixers_of_stack(stack)
            for moe in filter(None, (config.routed_moe_of_layer(stack, layer=i) for i in layers)):
                yield from self._moe_layer(moe, tokens=tokens)
            # every mixer and dense feed-forward, forward and backward
            pairs = sum(config.is_dense_layer(stack, layer=i) for i in layers)
            pairs += sum(mixer.tensor_exchanges(shape) for mixer in mixers)
            yield from self._gather_and_scatter(2 * pairs * tokens)
            ranks = {"ranks": plan.context, "tensor": plan.tensor}
            values = sum(m.exchanged_values(shape, tokens=tokens, **ranks) for m in mixers)
            yield from self._context_exchange(values)
            yield from self._gather_and_scatter(tokens)  # vocabulary-parallel embedding
        yield from self._vocab_parallel_loss(target)
        if config.encoder.layers:  # cross-attention gathers its sources, but scatters no output
            layers = config.decoder.layers
            yield from self._gather_and_scatter(layers * (2 * target + source))
            values = config.attention.exchanged_values(
                config.dim, queries=target, keys=source, ranks=plan.context, tensor=plan.tensor
            )
            yield from self._context_exchange(layers * values)

    def _gather_and_scatter(self, tokens: int) -> ActivationVolumes:
        """All-gather over tensor ranks and reduce-scatter (an all-to-all and a local sum)."""
        size = tokens * self._row_bytes
        yield from (("all-gather", "tensor", size), ("all-to-all", "tensor", size))

    def _moe_layer(self, moe: MoE, *, tokens: int) -> ActivationVolumes:
        parameters, plan = self.parameters, self.parameters.plan
        dim = moe.dispatch_projection.expert_dim(parameters.inventory.config.dim)
        expert, slices = plan.expert_ranks(moe.experts), plan.expert_tensor
        chosen = round(moe.select.experts_per_token(moe.num_router_outputs))
        rows = DispatchedTokens(tokens, experts_per_token=chosen, dim=dim, itemsize=self.itemsize)
        if expert * slices > 1:
            counts = moe.experts * INT64_BYTES
            yield "all-to-all", "expert", counts * (expert - 1) / expert
            yield "all-gather", "expert_tensor", counts * (slices - 1)
            yield "all-to-all", "expert", 2 * all_to_all_bytes(rows, ranks=expert)
            # forward gathers at dispatch and scatters at combine, backward the other way round
            yield "all-gather", "expert_tensor", expert_tensor_bytes(rows, expert_tensor=slices)
            yield "all-to-all", "expert_tensor", expert_tensor_bytes(rows, expert_tensor=slices)
        ranks, axis = plan.stage_size, "stage"
        yield "all-reduce", axis, routing_statistics_bytes(moe, ranks=ranks)
        # of an even load: a full expert adds sums of 256 counts for each digit of a key
        scope, integers = (
            parameters.parallel.capacity_scope,
            moe.limit.num_summed_integers(moe.num_router_outputs),
        )
        if scope.of_experts:
            ranks, axis = (
                expert * slices,
                parameters.group_name(scope.axes, num_experts=moe.experts),
            )
        elif scope.axes != STAGE_AXES:
            ranks, axis = plan.context * plan.tensor, parameters.group_name(scope.axes)
        yield "all-reduce", axis, 2 * integers * INT64_BYTES * (ranks - 1) // ranks

    def _vocab_parallel_loss(self, tokens: int) -> ActivationVolumes:
        """Hidden states and labels of all tensor ranks, and four numbers for each token."""
        others = self.parameters.plan.tensor - 1
        yield from self._gather_and_scatter(tokens)
        yield "all-gather", "tensor", others * (tokens + 1) * INT64_BYTES
        yield "all-reduce", "tensor", 2 * others * tokens * 4 * 4

    def _context_exchange(self, values: float) -> ActivationVolumes:
        """What mixers send to other context ranks, forward and backward."""
        yield "all-to-all", "context", 2 * values * self.itemsize


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
