"""Sends: the bytes that a rank of a plan puts on the wire in one training step, in closed form.

Routing is taken to be even. What is counted is what ``distributed/communication_counter.py`` counts: each collective once,
on a wire that carries no byte twice. The axis of a line is the one that the plan names; a
collective over several of them joins their names.

Letters: t tokens of a rank, D dim of the rows that travel, k experts per token.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from moesaic.distributed.world import BUCKET_BYTES
from moesaic.model.config import Stack
from moesaic.model.parameter_count import BatchDims
from moesaic.moe.config import MoE
from moesaic.parallel.batch_ranks import GlobalBatch
from moesaic.parallel.memory_estimate import tokens_per_rank
from moesaic.parallel.parameter_inventory import RankParameters

INT64_BYTES = FLOAT64_BYTES = 8
Lines = Iterator[tuple[str, str, float]]


@dataclass(frozen=True, slots=True)
class CommunicationVolume:
    """Bytes that one rank sends in a step by one kind of collective over one axis."""

    kind: str
    axis: str
    bytes: int


@dataclass(frozen=True, slots=True)
class DispatchedTokens:
    """What one rank dispatches in a layer: ``tokens`` rows of ``dim`` numbers, each to k experts."""

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
    """Return the bytes of the all-gather over the slices of an expert and the reduce-scatter back."""
    return 2 * tokens.total_bytes * (expert_tensor - 1)


def communication_volume(
    rank_parameters: RankParameters, *, sizes: BatchDims, micro_batches: int = 1, itemsize: int = 4
) -> tuple[CommunicationVolume, ...]:
    """Return what a rank sends in a step of so many micro-batches of ``sizes``, sorted.

    ``itemsize`` is that of the rows that travel; weights and gradients travel in float32.
    """
    sums: Counter[tuple[str, str]] = Counter()
    for kind, axis, size in _forward_backward(rank_parameters, sizes=sizes, itemsize=itemsize):
        sums[kind, axis] += round(micro_batches * size)
    for kind, axis, size in _gradient_sync(rank_parameters, micro_batches=micro_batches):
        sums[kind, axis] += round(size)
    return tuple(CommunicationVolume(*key, size) for key, size in sorted(sums.items()) if size)


def _forward_backward(holding: RankParameters, *, sizes: BatchDims, itemsize: int) -> Lines:
    """Forward and backward of a micro-batch."""
    config = holding.inventory.config
    tokens = tokens_per_rank(holding, sizes)
    for stack, count in zip((config.encoder, config.decoder), tokens, strict=True):
        for layer in range(stack.layers):
            moe = config.routed_moe_of_layer(stack, layer=layer)
            if moe is not None:
                yield from _moe_layer(holding, moe, tokens=count, itemsize=itemsize)
        yield from _tensor_parallel_layers(holding, stack, tokens=count, itemsize=itemsize)
        yield from _ulysses_attention(holding, stack, asking=count, asked=count, itemsize=itemsize)
        yield from _embedding_lookup(holding, tokens=count, itemsize=itemsize)
    yield from _vocab_parallel_loss(holding, tokens=tokens[1], itemsize=itemsize)
    if config.encoder.layers:  # the cross-attention's queries part again, its sources do not
        source, target = (config.decoder.layers * count for count in tokens)
        lanes = holding.plan.tensor
        yield from _gather_and_scatter(target, dim=config.dim, itemsize=itemsize, lanes=lanes)
        size = (lanes - 1) * source * config.dim * itemsize
        yield from (("all-gather", "tensor", size), ("all-to-all", "tensor", size))
        yield from _ulysses_attention(
            holding, config.decoder, asking=tokens[1], asked=tokens[0], itemsize=itemsize
        )


def _moe_layer(holding: RankParameters, moe: MoE, *, tokens: int, itemsize: int) -> Lines:
    plan, dim = holding.plan, moe.dispatch_projection.expert_dim(holding.inventory.config.dim)
    over, cuts = plan.expert_ranks(moe.experts), plan.expert_tensor
    chosen = round(moe.select.experts_per_token(moe.num_router_outputs))
    rows = DispatchedTokens(tokens, experts_per_token=chosen, dim=dim, itemsize=itemsize)
    if over * cuts > 1:
        counts = moe.experts * INT64_BYTES
        yield "all-to-all", "expert", counts * (over - 1) / over
        yield "all-gather", "expert_tensor", counts * (cuts - 1)
        yield "all-to-all", "expert", 2 * all_to_all_bytes(rows, ranks=over)
        # gathered going out and scattered home; going back the other way round
        yield "all-gather", "expert_tensor", expert_tensor_bytes(rows, expert_tensor=cuts)
        yield "all-to-all", "expert_tensor", expert_tensor_bytes(rows, expert_tensor=cuts)
    ranks = plan.stage_size
    statistics = (4 * moe.num_router_outputs + 1) * FLOAT64_BYTES
    yield "all-reduce", "stage", 2 * statistics * (ranks - 1) // ranks
    told, room = moe.limit.num_gathered_integers(tokens * chosen) * INT64_BYTES, "stage"
    if not isinstance(holding.parallel.capacity_scope, GlobalBatch):
        room = holding.group_name(("expert", "expert_tensor"), experts=moe.experts)
        ranks = over * cuts
    yield "all-gather", room, told * (ranks - 1)


def _tensor_parallel_layers(
    holding: RankParameters, stack: Stack, *, tokens: int, itemsize: int
) -> Lines:
    """Rows that meet in matrices cut over tensor ranks: every attention and dense feed-forward."""
    config = holding.inventory.config
    dense = sum(config.routed_moe_of_layer(stack, layer=i) is None for i in range(stack.layers))
    met = (stack.layers + dense) * tokens
    yield from _gather_and_scatter(
        met, dim=config.dim, itemsize=itemsize, lanes=holding.plan.tensor
    )


def _gather_and_scatter(tokens: int, *, dim: int, itemsize: int, lanes: int) -> Lines:
    size = 2 * (lanes - 1) * tokens * dim * itemsize
    yield from (("all-gather", "tensor", size), ("all-to-all", "tensor", size))


def _embedding_lookup(holding: RankParameters, *, tokens: int, itemsize: int) -> Lines:
    """Vectors of tokens from a table cut by rows: parts added up, gradients gathered."""
    size = (holding.plan.tensor - 1) * tokens * holding.inventory.config.dim * itemsize
    yield from (("all-to-all", "tensor", size), ("all-gather", "tensor", size))


def _vocab_parallel_loss(holding: RankParameters, *, tokens: int, itemsize: int) -> Lines:
    """States and labels of all ranks, and four numbers for each where a vocabulary is cut."""
    others = holding.plan.tensor - 1
    size = others * tokens * holding.inventory.config.dim * itemsize
    yield from (("all-to-all", "tensor", size), ("all-gather", "tensor", size))
    yield "all-gather", "tensor", others * (tokens + 1) * INT64_BYTES
    yield "all-reduce", "tensor", 2 * others * tokens * 4 * 4


def _ulysses_attention(
    holding: RankParameters, stack: Stack, *, asking: int, asked: int, itemsize: int
) -> Lines:
    """Tokens exchanged for heads and back (Ulysses, 2309.14509), once in each block of a stack."""
    config, plan, ranks = holding.inventory.config, holding.plan, holding.plan.context
    if ranks == 1:
        return
    heads = config.attention.heads // plan.tensor
    groups = config.attention.num_kv_heads() // plan.tensor
    read = sum(-(-(r + 1) * groups // ranks) - r * groups // ranks for r in range(ranks))
    per_token = 2 * heads * asking * (ranks - 1) / ranks + 2 * asked * read * (ranks - 1) / ranks
    size = 2 * stack.layers * plan.tensor * per_token * config.head_dim * itemsize
    yield "all-to-all", "context", size


def _gradient_sync(holding: RankParameters, *, micro_batches: int) -> Lines:
    """Sums over copies; with ZeRO also what makes weights whole."""
    plan = holding.plan
    without = (
        holding.inventory.first_rank_biases
        if holding.grid().coordinates(holding.rank)["tensor"]
        else frozenset()
    )
    reduced = 1 if plan.zero == 1 else micro_batches
    summed: dict[tuple[tuple[str, ...], int | None], list[int]] = {}
    for part in holding.shards:
        number = part.parameter.placement.experts
        if part.zero_axes:
            ranks = holding.num_ranks(part.zero_axes, experts=number)
            size = 4 * part.gathered_values * (ranks - 1)
            # the model's own parameters stay whole between forward and backward
            again = 2 if plan.zero == 3 and part.parameter.fsdp_unit else 1
            axis = holding.group_name(part.zero_axes, experts=number)
            yield "all-gather", axis, size * again * micro_batches
            if part.parameter.name not in without:
                yield "reduce-scatter", axis, size * reduced
        axes = tuple(a for a in part.all_reduce_axes if holding.num_ranks((a,), experts=number) > 1)
        if axes:
            summed.setdefault((axes, number), []).append(4 * math.prod(part.shape))
    for (axes, number), parts in summed.items():
        ranks = holding.num_ranks(axes, experts=number)
        for size in _buckets(parts):
            axis = holding.group_name(axes, experts=number)
            yield "all-reduce", axis, 2 * size * (ranks - 1) // ranks


def _buckets(sizes: list[int]) -> Iterator[int]:
    """As ``distributed/world.py`` sums gradients: together while they are small."""
    held = 0
    for size in sizes:
        if held and held + size > BUCKET_BYTES:
            yield held
            held = 0
        held += size
    yield held
