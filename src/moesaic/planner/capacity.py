"""Capacity: the most experts per layer whose step fits the memory of a rank."""

from collections.abc import Mapping
from dataclasses import dataclass

from moesaic.core.errors import UserError
from moesaic.model.config import ModelConfig
from moesaic.model.parameter_flop_count import count_parameters
from moesaic.moe.config import MoE
from moesaic.planner.cost_entries import DEVICE, HOST
from moesaic.planner.cost_settings import CostSettings
from moesaic.planner.step_cost import peak_memory

MAX_EXPERTS_PER_RANK = 1 << 20  # the search ends there


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes of memory of each device, and of the host for each device."""

    device: float
    host: float = float("inf")

    def excess(self, peak: Mapping[str, int]) -> float:
        """Return by how many bytes a step is over the budget; at most 0 if it fits."""
        return max(peak[DEVICE] - self.device, peak.get(HOST, 0) - self.host)


@dataclass(frozen=True, slots=True)
class LargestModel:
    """The most experts per layer that fit, the model's parameters then, and rank 0's peak bytes."""

    experts: int
    parameters: int
    peak: Mapping[str, int]


def largest_fitting_model(settings: CostSettings, *, budget: MemoryBudget) -> LargestModel | None:
    """Return the model with the most experts per layer that fits, or None if none does.

    Memory grows almost linearly with the number of experts, so the search is by regula falsi: a few
    steps, each of which measures a layer. Raises UserError for a model without experts or with
    another number of them in some layers.
    """
    config, ranks = settings.model, settings.parallel.plan.expert
    peaks: dict[int, Mapping[str, int]] = {}

    def excess(per_rank: int) -> float:
        changed = with_experts(config, ranks * per_rank)
        peaks[per_rank] = peak_memory(settings.replace(model=changed))
        return budget.excess(peaks[per_rank])

    low = -(-_experts_per_token(config) // ranks)  # at least as many experts as a token is sent to
    under = excess(low)
    if under > 0:
        return None
    high, over = 2 * low, excess(2 * low)
    while over <= 0 and high < MAX_EXPERTS_PER_RANK:
        slope = (over - under) / (high - low)
        jump = high - over / slope if slope > 0 else MAX_EXPERTS_PER_RANK
        low, under = high, over
        high = max(low + 1, min(round(jump * 1.02) + 1, MAX_EXPERTS_PER_RANK))
        over = excess(high)
    while high - low > 1 and over > 0:
        guess = low + round((high - low) * under / (under - over))
        middle = min(max(guess, low + 1), high - 1)
        found = excess(middle)
        if found <= 0:
            low, under = middle, found
        else:
            high, over = middle, found
    best = high if over <= 0 else low
    largest = with_experts(config, ranks * best)
    return LargestModel(ranks * best, count_parameters(largest).total, peaks[best])


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
