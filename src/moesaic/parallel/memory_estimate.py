"""Memory estimate: the bytes of a rank during a training step, and the largest model that fits.

Weights, gradients and optimizer state are exact. Activations are those of
``model/training_memory.py`` for this rank's tokens; what ZeRO gathers at the peak is an upper
bound. What the memory plan keeps away from the device is in the host's memory.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import nn

from moesaic.core.errors import UserError
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.model.config import ModelConfig
from moesaic.model.parameter_flop_count import BatchDims, count_parameters
from moesaic.model.training_memory import activation_bytes
from moesaic.moe.config import MoE
from moesaic.moe.experts import ExpertShape, FeedForwardExpert
from moesaic.ops.kernel_selection import estimated_kernel
from moesaic.ops.moe_kernel import KernelMemory, KernelShape, UnfusedMoEKernel
from moesaic.optim.optimizer import AdamW, Optimizer
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parameter_inventory import ParameterInventory, ParameterShard, RankParameters
from moesaic.parallel.precision import Float32, Precision

FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes on one rank by purpose; ``host`` is the part of them that is offloaded.

    ``gathered`` are the unsharded weights and gradients that ZeRO has beside its shards.
    ``activations`` are kept between forward and backward.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    host: int = 0

    @property
    def state(self) -> int:
        """Weights, gradients and optimizer state, offloaded or not."""
        return self.weights + self.gradients + self.optimizer

    @property
    def device(self) -> int:
        """Bytes of the device at the peak of a step."""
        return self.state - self.host + self.gathered + self.activations


def estimate_memory(
    rank_parameters: RankParameters,
    *,
    sizes: BatchDims,
    optimizer: Optimizer | None = None,
    precision: Precision | None = None,
    kernel: KernelMemory | None = None,
) -> RankMemory:
    """Estimate a step whose micro-batch of ``sizes`` is sharded over context and tensor ranks.

    ``kernel`` computes the MoE layers; by default the fused one.
    """
    activation = rank_parameters.inventory.config.feed_forward.activation
    kernel = kernel or estimated_kernel(activation)
    precision, optimizer = precision or Float32(), optimizer or AdamW()
    shards = rank_parameters.shards
    state = [_parameter_bytes(shard, precision, optimizer) for shard in shards]
    weights, gradients, optimizer_state = (sum(column) for column in zip(*state, strict=True))
    tiers = rank_parameters.parallel.memory
    activations = _activation_bytes(rank_parameters, sizes=sizes, kernel=kernel)
    return RankMemory(
        weights,
        gradients,
        optimizer_state,
        gathered=_zero_gathered_bytes(rank_parameters, precision),
        activations=activations * precision.compute_dtype.itemsize // FLOAT32_BYTES,
        host=sum(
            0 if tier.is_device else size
            for tier, size in (
                (tiers.parameters, weights),
                (tiers.gradients, gradients),
                (tiers.optimizer_states, optimizer_state),
            )
        ),
    )


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


def _parameter_bytes(
    shard: ParameterShard, each: Precision, optimizer: Optimizer
) -> tuple[int, int, int]:
    """Return the bytes of weight, gradient and optimizer state."""
    values, parameter = (
        math.prod(shard.shape),
        nn.Parameter(torch.empty(shard.shape, device="meta")),
    )
    rule = optimizer.param_group(parameter, kind=shard.parameter.kind)["rule"]
    state = sum(s.numel() * s.element_size() for s in rule.initial_state(parameter).values())
    narrow = each.parameter_dtype != torch.float32
    state += values * each.master_weights.bytes_per_value if narrow else 0
    sizes = each.parameter_dtype.itemsize, each.gradient_dtype.itemsize
    return values * sizes[0], values * sizes[1], state


def _zero_gathered_bytes(parameters: RankParameters, each: Precision) -> int:
    """Return an upper bound of the unsharded weights and gradients beside the shards."""
    stage, units = parameters.plan.zero, dict[str, int]()
    for shard in parameters.shards:
        if shard.zero_axes:
            unit = shard.parameter.fsdp_unit
            units[unit] = units.get(unit, 0) + math.prod(shard.shape_before_zero)
    root = units.pop("", 0)
    # a block is gathered while the one before it still computes
    pairs = itertools.pairwise([0, *units.values()])
    two, every = max((a + b for a, b in pairs), default=0), sum(units.values())
    weights = root + (two if stage == 3 else every)
    gradients = root + (every if stage == 1 else two)
    return weights * each.parameter_dtype.itemsize + gradients * each.gradient_dtype.itemsize


def _activation_bytes(parameters: RankParameters, *, sizes: BatchDims, kernel: KernelMemory) -> int:
    """Return the bytes in float32 that autograd keeps of this rank's tokens."""
    config, ranks = parameters.inventory.config, parameters.plan.tensor
    source, target = tokens_per_rank(parameters, sizes)
    # beyond one rank with whole matrices: the gathered tokens of the other tensor ranks
    values, gathered = 0, (ranks - 1) * config.dim
    for side, tokens in (("encoder", source), ("decoder", target)):
        stack, shape = config.stack_of(side), config.mixer_shape(side)
        for mixer in config.mixers_of_stack(stack):
            values += tokens * mixer.tensor_exchanges(shape) * gathered
        for layer in range(stack.layers):
            moe = config.routed_moe_of_layer(stack, layer=layer)
            if moe is not None:
                extra = _extra_expert_values(config, moe, plan=parameters.plan, kernel=kernel)
                values += tokens * extra
            elif config.is_dense_layer(stack, layer=layer):
                values += tokens * gathered
    if config.encoder.layers:  # queries and sources of cross-attention
        values += config.decoder.layers * (source + target) * gathered
    # every rank scores the tokens of all tensor ranks against its rows of the embedding
    table = config.vocab_size * config.dim
    values += target * gathered - (table - table // ranks)
    local = BatchDims(rows=1, source=source, target=target)
    return activation_bytes(config, sizes=local) + FLOAT32_BYTES * values


def _extra_expert_values(
    config: ModelConfig, moe: MoE, *, plan: ParallelPlan, kernel: KernelMemory
) -> int:
    """Return the values per token that experts keep beyond ``model/training_memory.py``.

    That file assumes whole experts on one rank, and the fused kernel.
    """
    feed = moe.feed_forward(config.feed_forward)
    dim, slices = moe.dispatch_projection.expert_dim(config.dim), plan.expert_tensor
    edges = moe.select.experts_per_token(moe.num_router_outputs)
    shape = ExpertShape(moe.experts, dim, feed, config.bias)
    live = moe.experts / moe.num_router_outputs
    counted = moe.expert.saved_activations(shape, edges=edges, live_fraction=live)
    per_edge = counted / edges
    if isinstance(moe.expert, FeedForwardExpert):
        width = feed.activation.width(feed.hidden) // slices
        per_edge = kernel.saved_activations(KernelShape(dim, width, config.bias, 1.0))
    if plan.expert_ranks(moe.experts) * slices == 1:
        return math.ceil(edges * per_edge - counted)
    # these kernels keep their input rows in a copy, which per_edge includes
    copies = isinstance(kernel, UnfusedMoEKernel) or config.bias
    received = slices * (per_edge + (0 if copies else dim))
    return math.ceil(edges * (received + dim + 1) - counted)  # dim + 1: the combined outputs


MAX_EXPERTS_PER_RANK = 1 << 20  # the search ends there


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes of memory of each device, and of the host for each device."""

    device: float
    host: float = float("inf")

    def fits(self, memory: RankMemory) -> bool:
        """Whether a rank is within the budget."""
        return memory.device <= self.device and memory.host <= self.host


@dataclass(frozen=True, slots=True)
class LargestModel:
    """The most experts per layer that fit, the model's parameters then, and rank 0's memory."""

    experts: int
    parameters: int
    memory: RankMemory


@dataclass(frozen=True, slots=True)
class EstimateSettings:
    """The settings of an estimate, all but the model."""

    parallel: ParallelConfig
    world: int
    sizes: BatchDims
    precision: Precision | None = None
    optimizer: Optimizer | None = None

    def estimate(self, config: ModelConfig) -> RankMemory:
        """Return the memory of rank 0."""
        parameters = ParameterInventory(config).on_rank(self.parallel, world=self.world)
        return estimate_memory(
            parameters,
            sizes=self.sizes,
            precision=self.precision,
            optimizer=self.optimizer,
        )


def largest_fitting_model(
    config: ModelConfig, *, settings: EstimateSettings, budget: MemoryBudget
) -> LargestModel | None:
    """Return the config with the most experts per layer that fits the budget, or None if none does.

    Memory never falls with the number of experts, so a bisection finds it in some forty estimates.
    Raises UserError for a model without experts or with another number of them in some layers.
    """
    ranks = settings.parallel.plan.expert

    def fits(experts_per_rank: int) -> bool:
        return budget.fits(settings.estimate(with_experts(config, ranks * experts_per_rank)))

    low = -(-_experts_per_token(config) // ranks)  # at least as many experts as a token is sent to
    if not fits(low):
        return None
    high = low
    while high < MAX_EXPERTS_PER_RANK:
        high = min(2 * high, MAX_EXPERTS_PER_RANK)
        if not fits(high):
            break
        low = high
    # ZeRO rounds shards up, so memory is not linear in the number of experts
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    largest = with_experts(config, ranks * low)
    parameters = count_parameters(largest).total
    return LargestModel(ranks * low, parameters, settings.estimate(largest))


def with_experts(config: ModelConfig, experts: int) -> ModelConfig:
    """Return a config with so many experts in every MoE layer."""
    stacks = {"encoder": config.encoder, "decoder": config.decoder}
    if any(stack.experts_per_layer for stack in stacks.values()) or not isinstance(config.moe, MoE):
        raise UserError(
            "the largest model that fits needs one number of experts in all layers: set model.moe "
            "to an MoE, and no encoder.experts_per_layer or decoder.experts_per_layer"
        )
    for side, stack in stacks.items():
        if isinstance(stack.moe, MoE):
            stacks[side] = stack.replace(moe=stack.moe.replace(experts=experts))
    return config.replace(moe=config.moe.replace(experts=experts), **stacks)


def _experts_per_token(config: ModelConfig) -> int:
    layers = (config.moe, config.encoder.moe, config.decoder.moe)
    chosen = [
        moe.select.experts_per_token(moe.num_router_outputs)
        for moe in layers
        if isinstance(moe, MoE)
    ]
    return max(1, *map(round, chosen))
