"""Cost: the bytes a rank of a plan holds during a training step, from the config alone.

Weights, gradients and optimizer state are exact. Activations are what ``model/training_memory.py`` says
of this rank's tokens, and what ZeRO gathers at the peak is a bound; both are forecasts (see the law
of that name). Where a plan offloads, the shares of ZeRO lie in the host's memory.

Letters: t tokens of a rank, D model dim.

Capacity: the largest model of a family that fits, grown in experts until a rank is full.

The family is a config with more or fewer experts in every layer. A rank that holds more of them
never holds fewer bytes, so the most that fit are found by halving, in some forty prices.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import nn

from moesaic.core.config import Config
from moesaic.core.errors import UserError
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.parameter_count import BatchDims, count_parameters
from moesaic.model.training_memory import activation_bytes
from moesaic.moe.config import MoE, SparseLayer
from moesaic.moe.experts import ExpertShape, FeedForwardExpert
from moesaic.ops.kernel_selection import select_moe_kernel
from moesaic.ops.moe_kernel import KernelShape, MoEKernel, UnfusedMoEKernel
from moesaic.optim.optimizer import AdamW, Optimizer
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parameter_inventory import ParameterInventory, ParameterShard, RankParameters

FLOAT32_BYTES = 4


class BytesPerValue(Config):
    """Bytes per value: of a weight, of its gradient, and of the copy that an update adds to.

    The default is what this package does: float32 weights (autocast computes in bfloat16), no
    second copy. ``MIXED_PRECISION`` is mixed precision as ZeRO counts it (1910.02054, section 3.1): 2 + 2
    bytes, and 12 of optimizer state with AdamW.
    """

    weight: int = 4
    gradient: int = 4
    master: int = 0


MIXED_PRECISION = BytesPerValue(weight=2, gradient=2, master=4)


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes by purpose on one rank; those of ``host`` are not on the device.

    ``gathered`` is what ZeRO makes whole beyond its shares: weights, and gradients not shared out
    yet. ``activations`` are kept between forward and backward.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    host: int = 0

    @property
    def state(self) -> int:
        """Weights, gradients and optimizer state, wherever they lie."""
        return self.weights + self.gradients + self.optimizer

    @property
    def device(self) -> int:
        """What the device needs at the peak of a step."""
        return self.state - self.host + self.gathered + self.activations


def estimate_memory(
    rank_parameters: RankParameters,
    *,
    sizes: BatchDims,
    optimizer: Optimizer | None = None,
    bytes_per_value: BytesPerValue | None = None,
    kernel: MoEKernel | None = None,
) -> RankMemory:
    """Forecast a step of which this rank's context and tensor neighbours share ``sizes``.

    ``mixer`` computes the mixtures; by default the one of this machine's CPU.
    """
    feed = rank_parameters.inventory.config.feed_forward
    kernel = kernel or select_moe_kernel(torch.empty(0), activation=feed.activation)
    bytes_per_value, optimizer = bytes_per_value or BytesPerValue(), optimizer or AdamW()
    state = [
        _parameter_bytes(part, storage=bytes_per_value, optimizer=optimizer)
        for part in rank_parameters.shards
    ]
    shared = [s for s, part in zip(state, rank_parameters.shards, strict=True) if part.zero_axes]
    weights, gradients, slots = (sum(s[i] for s in state) for i in range(3))
    return RankMemory(
        weights,
        gradients,
        slots,
        gathered=_zero_gathered_bytes(rank_parameters, storage=bytes_per_value),
        activations=_activation_bytes(rank_parameters, sizes=sizes, mixer=kernel)
        * bytes_per_value.weight
        // FLOAT32_BYTES,
        host=sum(map(sum, shared)) if rank_parameters.plan.offload else 0,
    )


def tokens_per_rank(rank_parameters: RankParameters, sizes: BatchDims) -> tuple[int, int]:
    """Return the source and target tokens that a rank holds. Raises UserError if uneven."""
    lanes = rank_parameters.plan.context * rank_parameters.plan.tensor
    source = sizes.rows * sizes.source if rank_parameters.inventory.config.encoder.layers else 0
    target = sizes.rows * sizes.target
    if source % lanes or target % lanes:
        raise UserError(
            f"{source} source and {target} target tokens cannot be dealt evenly to the {lanes} "
            "ranks of context x tensor, which forecasts take for granted: choose other rows"
        )
    return source // lanes, target // lanes


def _parameter_bytes(
    part: ParameterShard, *, storage: BytesPerValue, optimizer: Optimizer
) -> tuple[int, int, int]:
    values = math.prod(part.shape)
    parameter = nn.Parameter(torch.empty(part.shape, device="meta"))
    rule = optimizer.param_group(parameter, kind=part.parameter.kind)["rule"]
    slots = sum(s.numel() * s.element_size() for s in rule.initial_state(parameter).values())
    return values * storage.weight, values * storage.gradient, values * storage.master + slots


def _zero_gathered_bytes(holding: RankParameters, *, storage: BytesPerValue) -> int:
    """Bytes of whole weights and gradients beside the shares, at most."""
    stage, units = holding.plan.zero, dict[str, int]()
    for part in holding.shards:
        if part.zero_axes:
            unit = part.parameter.fsdp_unit
            units[unit] = units.get(unit, 0) + math.prod(part.shape_before_zero)
    root = units.pop("", 0)
    # a block is gathered while the one before it is still at work
    pairs = itertools.pairwise([0, *units.values()])
    two, every = max((a + b for a, b in pairs), default=0), sum(units.values())
    weights = root + (two if stage == 3 else every)
    gradients = root + (every if stage == 1 else two)
    return weights * storage.weight + gradients * storage.gradient


def _activation_bytes(holding: RankParameters, *, sizes: BatchDims, mixer: MoEKernel) -> int:
    """What autograd keeps of the tokens of this rank, in float32."""
    config, plan = holding.inventory.config, holding.plan
    source, target = tokens_per_rank(holding, sizes)
    here = BatchDims(rows=1, source=source, target=target)
    rest = 0
    for stack, tokens in ((config.encoder, source), (config.decoder, target)):
        rest += tokens * _extra_values_per_token(holding, stack, mixer=mixer)
    if config.encoder.layers:  # queries and sources of the cross-attention meet in matrices as well
        rest += config.decoder.layers * (source + target) * (plan.tensor - 1) * config.dim
    # every rank scores all tokens that met against its own rows of the table
    table = config.vocab_size * config.dim
    rest += (plan.tensor - 1) * target * config.dim - (table - table // plan.tensor)
    return activation_bytes(config, sizes=here) + FLOAT32_BYTES * rest


def _extra_values_per_token(holding: RankParameters, stack: Stack, *, mixer: MoEKernel) -> int:
    """Values per token that a stack keeps beyond those of a rank that holds all of it."""
    config, values = holding.inventory.config, 0
    for layer in range(stack.layers):
        moe = config.routed_moe_of_layer(stack, layer=layer)
        met = (holding.plan.tensor - 1) * config.dim  # each rank keeps the rows of all that met
        values += met if moe is not None else 2 * met
        if moe is not None:
            values += _extra_expert_values(config, moe, plan=holding.plan, mixer=mixer)
    return values


def _extra_expert_values(
    config: ModelConfig, moe: MoE, *, plan: ParallelPlan, mixer: MoEKernel
) -> int:
    """What a mixture keeps per token beyond what ``model/training_memory.py`` says of this machine's."""
    feed, dim = (
        moe.feed_forward(config.feed_forward),
        moe.dispatch_projection.expert_dim(config.dim),
    )
    cuts, edges = plan.expert_tensor, moe.select.experts_per_token(moe.num_router_outputs)
    width = feed.activation.width(feed.hidden) // cuts
    size = ExpertShape(moe.experts, dim, feed, config.bias)
    said = moe.expert.saved_activations(
        size, edges=edges, live_fraction=moe.experts / moe.num_router_outputs
    )
    each = said / edges
    if isinstance(moe.expert, FeedForwardExpert):
        each = mixer.saved_activations(KernelShape(dim, width, config.bias, 1.0))
    if plan.expert_ranks(moe.experts) * cuts == 1:
        return math.ceil(edges * each - said)
    copies = (
        isinstance(mixer, UnfusedMoEKernel) or config.bias
    )  # rows in a copy of its own, counted there
    received = cuts * (each + (0 if copies else dim))
    return math.ceil(edges * (received + dim + 1) - said)  # and the answers that came home


MAX_EXPERTS_PER_RANK = 1 << 20  # experts per rank: the search ends there


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes of each device, and of the host's memory for each device."""

    device: float
    host: float = float("inf")

    def fits(self, found: RankMemory) -> bool:
        """Whether a rank is within it."""
        return found.device <= self.device and found.host <= self.host


@dataclass(frozen=True, slots=True)
class LargestModel:
    """The most experts per layer that fit, what the model then is, and what rank 0 holds."""

    experts: int
    parameters: int
    memory: RankMemory


@dataclass(frozen=True, slots=True)
class EstimateSettings:
    """Everything but the number of experts."""

    parallel: ParallelConfig
    world: int
    sizes: BatchDims
    bytes_per_value: BytesPerValue | None = None
    optimizer: Optimizer | None = None

    def estimate(self, config: ModelConfig) -> RankMemory:
        """Return what rank 0 holds."""
        holding = ParameterInventory(config).on_rank(self.parallel, world=self.world)
        return estimate_memory(
            holding,
            sizes=self.sizes,
            bytes_per_value=self.bytes_per_value,
            optimizer=self.optimizer,
        )


def largest_fitting_model(
    config: ModelConfig, *, settings: EstimateSettings, budget: MemoryBudget
) -> LargestModel | None:
    """Return the largest model of the family, or None if not even one expert per rank fits.

    Raises UserError for a model without experts or with a number of its own in some layers.
    """
    step = settings.parallel.plan.expert

    def price(each: int) -> RankMemory:
        return settings.estimate(with_experts(config, step * each))

    # at least as many experts as a token takes
    fits = -(-_experts_per_token(config) // step)
    held = price(fits)
    if not budget.fits(held):
        return None
    over = fits
    while over < MAX_EXPERTS_PER_RANK:
        over = min(2 * over, MAX_EXPERTS_PER_RANK)
        if not budget.fits(price(over)):
            break
        fits = over
    # ZeRO's shares are rounded up, so what an expert costs is no straight line: halve what is left
    while over - fits > 1:
        half = (fits + over) // 2
        fits, over = (half, over) if budget.fits(price(half)) else (fits, half)
    each, held = fits, price(fits)
    made = with_experts(config, step * each)
    return LargestModel(step * each, count_parameters(made).total, held)


def with_experts(config: ModelConfig, experts: int) -> ModelConfig:
    """Return a config with so many experts in every sparse layer."""
    sides = {"encoder": config.encoder, "decoder": config.decoder}
    if any(stack.experts_per_layer for stack in sides.values()) or not isinstance(config.moe, MoE):
        raise UserError(
            "capacity is asked of a model with one number of experts in all its layers: set "
            "model.moe to an MoE, and no encoder.experts_per_layer or decoder.experts_per_layer"
        )
    changed = {side: _stack_with_experts(stack, experts) for side, stack in sides.items()}
    return config.replace(moe=config.moe.replace(experts=experts), **changed)


def _stack_with_experts(stack: Stack, experts: int) -> Stack:
    return (
        stack.replace(moe=_sparse_with_experts(stack.moe, experts))
        if stack.moe is not None
        else stack
    )


def _sparse_with_experts(sparse: SparseLayer, experts: int) -> SparseLayer:
    return sparse.replace(experts=experts) if isinstance(sparse, MoE) else sparse


def _experts_per_token(config: ModelConfig) -> int:
    bodies = [config.moe, config.encoder.moe, config.decoder.moe]
    chosen = [
        m.select.experts_per_token(m.num_router_outputs) for m in bodies if isinstance(m, MoE)
    ]
    return max(1, *map(round, chosen))
