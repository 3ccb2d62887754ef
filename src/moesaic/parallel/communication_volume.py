"""Communication volume: the bytes that a rank sends in one training step of a plan, in closed form.

Routing is taken as even. The bytes are those that ``distributed/communication_counter.py`` counts:
each collective once, by an algorithm that sends no byte twice. A collective is named by the axes of
its ranks ("data+context").
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from moesaic.distributed.mesh import STAGE_AXES
from moesaic.distributed.world import BUCKET_BYTES
from moesaic.model.parameter_flop_count import BatchDims
from moesaic.moe.config import MoE
from moesaic.parallel.memory_estimate import tokens_per_rank
from moesaic.parallel.parameter_inventory import RankParameters

INT64_BYTES = FLOAT64_BYTES = 8
Volumes = Iterator[tuple[str, str, float]]  # (kind, axis, bytes)


@dataclass(frozen=True, slots=True)
class CommunicationVolume:
    """Bytes that one rank sends in a step by one kind of collective over one axis."""

    kind: str
    axis: str
    bytes: int


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


def communication_volume(
    rank_parameters: RankParameters, *, sizes: BatchDims, micro_batches: int = 1, itemsize: int = 4
) -> tuple[CommunicationVolume, ...]:
    """Return what a rank sends in a step of ``micro_batches`` of these sizes, sorted.

    ``itemsize`` is that of hidden states; weights and gradients are sent in float32.
    """
    activations = _ActivationVolume(rank_parameters, itemsize)
    sums: Counter[tuple[str, str]] = Counter()
    for kind, axis, size in activations.forward_backward(sizes):
        sums[kind, axis] += round(micro_batches * size)
    for kind, axis, size in _gradient_sync(rank_parameters, micro_batches=micro_batches):
        sums[kind, axis] += round(size)
    return tuple(CommunicationVolume(*key, size) for key, size in sorted(sums.items()) if size)


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

    def forward_backward(self, sizes: BatchDims) -> Volumes:
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

    def _gather_and_scatter(self, tokens: int) -> Volumes:
        """All-gather over tensor ranks and reduce-scatter (an all-to-all and a local sum)."""
        size = tokens * self._row_bytes
        yield from (("all-gather", "tensor", size), ("all-to-all", "tensor", size))

    def _moe_layer(self, moe: MoE, *, tokens: int) -> Volumes:
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
        statistics = (4 * moe.num_router_outputs + 1) * FLOAT64_BYTES
        yield "all-reduce", axis, 2 * statistics * (ranks - 1) // ranks
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

    def _vocab_parallel_loss(self, tokens: int) -> Volumes:
        """Hidden states and labels of all tensor ranks, and four numbers for each token."""
        others = self.parameters.plan.tensor - 1
        yield from self._gather_and_scatter(tokens)
        yield "all-gather", "tensor", others * (tokens + 1) * INT64_BYTES
        yield "all-reduce", "tensor", 2 * others * tokens * 4 * 4

    def _context_exchange(self, values: float) -> Volumes:
        """What mixers send to other context ranks, forward and backward."""
        yield "all-to-all", "context", 2 * values * self.itemsize


def _gradient_sync(parameters: RankParameters, *, micro_batches: int) -> Volumes:
    """Yield the sums of gradients over copies and, with ZeRO, the all-gathers of weights."""
    plan, first = parameters.plan, parameters.grid().coordinates(parameters.rank)["tensor"] == 0
    no_gradient = frozenset() if first else parameters.inventory.first_rank_biases
    reductions = 1 if plan.zero == 1 else micro_batches
    summed: dict[tuple[tuple[str, ...], int | None], list[int]] = {}
    for shard in parameters.shards:
        number = shard.parameter.placement.num_experts
        if shard.zero_axes:
            ranks = parameters.num_ranks(shard.zero_axes, num_experts=number)
            size = 4 * shard.gathered_values * (ranks - 1)
            # parameters outside of blocks stay gathered between forward and backward
            gathers = 2 if plan.zero == 3 and shard.parameter.fsdp_unit else 1
            axis = parameters.group_name(shard.zero_axes, num_experts=number)
            yield "all-gather", axis, size * gathers * micro_batches
            if shard.parameter.name not in no_gradient:
                yield "reduce-scatter", axis, size * reductions
        axes = tuple(
            a for a in shard.all_reduce_axes if parameters.num_ranks((a,), num_experts=number) > 1
        )
        if axes:
            summed.setdefault((axes, number), []).append(4 * math.prod(shard.shape))
    for (axes, number), sizes in summed.items():
        ranks = parameters.num_ranks(axes, num_experts=number)
        for size in _buckets(sizes):
            axis = parameters.group_name(axes, num_experts=number)
            yield "all-reduce", axis, 2 * size * (ranks - 1) // ranks


def _buckets(sizes: list[int]) -> Iterator[int]:
    """Yield the bucket sizes of ``distributed/world.py``, which sums small gradients together."""
    bucket = 0
    for size in sizes:
        if bucket and bucket + size > BUCKET_BYTES:
            yield bucket
            bucket = 0
        bucket += size
    yield bucket
