"""Capacity: the largest model of a family that fits, grown in experts until a rank is full.

The family is a config with more or fewer experts in every layer. A rank that holds more of them
never holds fewer bytes, so the most that fit are found by halving, in some forty prices.
"""

from dataclasses import dataclass

from moesaic.core.errors import UserError
from moesaic.model.blueprint import ModelConfig, Stack
from moesaic.model.count import BatchDims, count_parameters
from moesaic.moe.config import MoE, SparseLayer
from moesaic.optim.optimizer import Optimizer
from moesaic.parallel.config import Parallel
from moesaic.parallel.cost import RankBytes, Storage, rank_bytes
from moesaic.parallel.inventory import Inventory

MOST = 1 << 20  # experts per rank: the search ends there


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes of each device, and of the host's memory for each device."""

    device: float
    host: float = float("inf")

    def holds(self, found: RankBytes) -> bool:
        """Whether a rank is within it."""
        return found.device <= self.device and found.host <= self.host


@dataclass(frozen=True, slots=True)
class Largest:
    """The most experts per layer that fit, what the model then is, and what rank 0 holds."""

    experts: int
    parameters: int
    held: RankBytes


@dataclass(frozen=True, slots=True)
class Setting:
    """Everything but the number of experts."""

    parallel: Parallel
    world: int
    sizes: BatchDims
    storage: Storage | None = None
    optimizer: Optimizer | None = None

    def price(self, config: ModelConfig) -> RankBytes:
        """Return what rank 0 holds."""
        holding = Inventory(config).on(self.parallel, world=self.world)
        return rank_bytes(holding, sizes=self.sizes, storage=self.storage, optimizer=self.optimizer)


def largest(config: ModelConfig, *, setting: Setting, budget: Budget) -> Largest | None:
    """Return the largest model of the family, or None if not even one expert per rank fits.

    Raises UserError for a model without experts or with a number of its own in some layers.
    """
    step = setting.parallel.plan.expert

    def price(each: int) -> RankBytes:
        return setting.price(with_experts(config, step * each))

    # at least as many experts as a token takes
    fits = -(-_fewest(config) // step)
    held = price(fits)
    if not budget.holds(held):
        return None
    over = fits
    while over < MOST:
        over = min(2 * over, MOST)
        if not budget.holds(price(over)):
            break
        fits = over
    # ZeRO's shares are rounded up, so what an expert costs is no straight line: halve what is left
    while over - fits > 1:
        half = (fits + over) // 2
        fits, over = (half, over) if budget.holds(price(half)) else (fits, half)
    each, held = fits, price(fits)
    made = with_experts(config, step * each)
    return Largest(step * each, count_parameters(made).total, held)


def with_experts(config: ModelConfig, experts: int) -> ModelConfig:
    """Return a config with so many experts in every sparse layer."""
    sides = {"encoder": config.encoder, "decoder": config.decoder}
    if any(stack.experts_per_layer for stack in sides.values()) or not isinstance(config.moe, MoE):
        raise UserError(
            "capacity is asked of a model with one number of experts in all its layers: set "
            "model.moe to an MoE, and no encoder.experts or decoder.experts"
        )
    changed = {side: _grown(stack, experts) for side, stack in sides.items()}
    return config.replace(moe=config.moe.replace(experts=experts), **changed)


def _grown(stack: Stack, experts: int) -> Stack:
    return stack.replace(moe=_many(stack.moe, experts)) if stack.moe is not None else stack


def _many(sparse: SparseLayer, experts: int) -> SparseLayer:
    return sparse.replace(experts=experts) if isinstance(sparse, MoE) else sparse


def _fewest(config: ModelConfig) -> int:
    bodies = [config.moe, config.encoder.moe, config.decoder.moe]
    chosen = [m.select.experts_per_token(m.num_router_outputs) for m in bodies if isinstance(m, MoE)]
    return max(1, *map(round, chosen))
