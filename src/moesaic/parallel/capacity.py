"""Capacity: the largest model of a family that fits, grown in experts until a rank is full.

The family is a config with more or fewer experts in every layer. A rank that holds more of them
never holds fewer bytes, so the most that fit are found by halving, in some forty prices.
"""

from dataclasses import dataclass

from moesaic.core.errors import UserError
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.count import BatchDims, count_parameters
from moesaic.moe.config import MoE, SparseLayer
from moesaic.optim.optimizer import Optimizer
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.cost import RankMemory, BytesPerValue, estimate_memory
from moesaic.parallel.inventory import ParameterInventory

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
        return estimate_memory(holding, sizes=self.sizes, bytes_per_value=self.bytes_per_value, optimizer=self.optimizer)


def largest_fitting_model(config: ModelConfig, *, settings: EstimateSettings, budget: MemoryBudget) -> LargestModel | None:
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
            "model.moe to an MoE, and no encoder.experts or decoder.experts"
        )
    changed = {side: _stack_with_experts(stack, experts) for side, stack in sides.items()}
    return config.replace(moe=config.moe.replace(experts=experts), **changed)


def _stack_with_experts(stack: Stack, experts: int) -> Stack:
    return stack.replace(moe=_sparse_with_experts(stack.moe, experts)) if stack.moe is not None else stack


def _sparse_with_experts(sparse: SparseLayer, experts: int) -> SparseLayer:
    return sparse.replace(experts=experts) if isinstance(sparse, MoE) else sparse


def _experts_per_token(config: ModelConfig) -> int:
    bodies = [config.moe, config.encoder.moe, config.decoder.moe]
    chosen = [m.select.experts_per_token(m.num_router_outputs) for m in bodies if isinstance(m, MoE)]
    return max(1, *map(round, chosen))
