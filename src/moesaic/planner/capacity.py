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

    Each step of the search measures a few layers, so it takes few: a peak is the largest of several
    linear functions of the number of experts, so it lies above the line through two smaller ones,
    and what is over the budget on that line is not measured. Raises UserError for a model without
    experts or with another number of them in some layers.
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
    high, probe = MAX_EXPERTS_PER_RANK + 1, 2 * low
    while high - low > 1:
        found = excess(probe)
        slope = (found - under) / (probe - low)
        if found > 0:
            high = probe
        else:
            low, under = probe, found
            if under + slope > 0:
                break
        room = int(-under / slope) if slope > 0 else high
        probe = min(low + max(room, 1), high - 1)
    largest = with_experts(config, ranks * low)
    return LargestModel(ranks * low, count_parameters(largest).total, peaks[low])


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
