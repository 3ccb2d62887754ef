"""Largest model: the most parameters that fit on N devices under each combination of 2109.10465.

Experts are added to every MoE layer of a base model until a device, or a node's host memory, is
full. Bytes of experts are linear in their number, so two inventories are enough for all plans.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from moesaic.memory.memory_plan import MemoryPlan
from moesaic.model.parameter_flop_count import count_parameters
from moesaic.parallel.activation_checkpointing import CheckpointBlocks
from moesaic.parallel.parameter_inventory import ParameterInventory
from moesaic.planner.capacity import with_experts
from moesaic.planner.inventory_cache import inventory_of
from moesaic.planner.machine import Machine
from moesaic.planner.plan_forecast import Limits, tier_sums
from moesaic.planner.plan_model import PlanModel
from moesaic.planner.plan_report import PlanRequest, plan_model, plan_words, training_problems
from moesaic.planner.plan_space import (
    GRADIENTS_ON_HOST,
    RESIDENT,
    CompletePlan,
    Degrees,
    Option,
)
from moesaic.planner.state_bytes import ShardedState

NOTE = (
    "experts are added to every MoE layer of this base until a tier is full, one row per "
    "micro-batch with activation checkpointing. Figures of the paper are from secondary texts; its "
    "table of sizes by number of devices has not been read"
)


@dataclass(frozen=True, slots=True)
class Combination:
    """A combination of 2109.10465, and what secondary texts quote of the paper about it."""

    name: str
    zero: Literal[0, 1, 2, 3] = 0
    memory: MemoryPlan = RESIDENT
    replicated: bool = False
    tensor: bool = False
    paper: str = ""

    def holds(self, degrees: Degrees) -> bool:
        """Whether degrees are of this combination: pipelines and context are not in the paper."""
        copies = degrees.data * degrees.tensor // degrees.expert
        alone = degrees.pipe * degrees.context * degrees.expert_tensor == 1
        replicas = self.zero > 0 or (copies > 1) == self.replicated
        return alone and replicas and (degrees.tensor > 1) == self.tensor and degrees.rows == 1


RESIDENT_400B = "about 400B in existing systems, which use GPU memory alone, on 512 of 40 GB"
COMBINATIONS = (
    Combination("E", paper=RESIDENT_400B),
    Combination("E+D", replicated=True, paper="bases of about 1.4B"),
    Combination("E+Z", zero=2, paper="bases of up to about 15B"),
    Combination("E+D+M", replicated=True, tensor=True),
    Combination("E+Z+M", zero=2, tensor=True, paper="bases of over 100B"),
    Combination(
        "E+Z-Offload+M",
        zero=2,
        memory=GRADIENTS_ON_HOST,
        tensor=True,
        paper="over 3.5T on 512 GPUs of 40 GB; 400B on 64",
    ),
)


@dataclass(frozen=True, slots=True)
class _Fit:
    """A plan and the number of experts of a layer that fills it."""

    experts: int
    choice: CompletePlan


def largest_models(request: PlanRequest, *, machine: Machine, limits: Limits) -> dict[str, Any]:
    """Return the largest model of each combination as JSON data.

    Raises UserError for a model whose layers differ in their number of experts.
    """
    few = 2 ** max(1, request.space.ranks.bit_length() - 1)
    states = [_sharded(request, n) for n in (few, 2 * few)]
    widest = request.replace(model=with_experts(request.model, few))
    inventory = inventory_of(request.model, trainable=request.trainable)
    base = plan_model(request, inventory=inventory, machine=machine)
    models = [PlanModel(replace(base.settings, state=state), request.space) for state in states]
    degrees, problems = list(request.space.degrees(widest.model)), training_problems(widest)
    rows = []
    for combination in COMBINATIONS:
        option = Option(combination.zero, combination.memory, CheckpointBlocks())
        fits = [
            _Fit(_most_experts(models, choice, few=few, limits=limits), choice)
            for choice in (CompletePlan(d, option) for d in degrees if combination.holds(d))
            if not any(problems(choice))
        ]
        rows.append(_row(request, combination, max(fits, key=lambda f: f.experts, default=None)))
    return {"name": request.name, "ranks": request.space.ranks, "rows": rows, "note": NOTE}


def _sharded(request: PlanRequest, experts: int) -> ShardedState:
    model = with_experts(request.model, experts)
    inventory = ParameterInventory(model, trainable=request.trainable)
    return ShardedState(inventory, optimizer=request.optimizer, each=request.precision)


def _most_experts(
    models: list[PlanModel], choice: CompletePlan, *, few: int, limits: Limits
) -> int:
    """Return the most experts of a layer with which a plan fits: bytes are linear in them."""
    low, high = (tier_sums(model.held(choice.degrees, choice.option)) for model in models)
    most = float("inf")
    for tier, size in high.items():
        slope = (size - low.get(tier, 0)) / few
        rest = limits.bytes.get(tier, 0) - (size - 2 * few * slope)
        if slope > 0:
            most = min(most, rest / slope)
        elif rest < 0:
            most = 0
    expert = choice.degrees.expert
    return max(0, int(most) // expert * expert) if most < float("inf") else 0


def _row(request: PlanRequest, combination: Combination, fit: _Fit | None) -> dict[str, Any]:
    row: dict[str, Any] = {"combination": combination.name, "paper": combination.paper}
    if fit is None or not fit.experts:
        return row | {"experts": 0, "parameters": 0, "plan": ""}
    config = with_experts(request.model, fit.experts)
    parameters = count_parameters(config).total
    return row | {
        "experts": fit.experts,
        "parameters": parameters,
        "plan": plan_words(fit.choice),
    }
