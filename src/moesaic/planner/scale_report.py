"""Scale report: the cost of a step on rank 0 under a parallel plan, as JSON data."""

from dataclasses import asdict
from typing import Any

from pydantic import Field

from moesaic.core.config import Config
from moesaic.model.config import ModelConfig
from moesaic.model.parameter_flop_count import BatchDims, count_parameters
from moesaic.optim.optimizer import AdamW, Optimizer
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parameter_inventory import RankParameters
from moesaic.parallel.precision import Float32, Precision
from moesaic.parallel.trainable_parameters import AllParameters, TrainableParameters
from moesaic.planner.cost_entries import DEVICE, HOST, Purpose, StepCost
from moesaic.planner.cost_settings import CostSettings
from moesaic.planner.inventory_cache import inventory_of
from moesaic.planner.step_cost import step_cost


class ScaleConfig(Config):
    """What a report depends on: model, plan, precision, optimizer, and more of a run."""

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: Precision = Float32()
    optimizer: Optimizer = AdamW()
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    trainable: TrainableParameters = AllParameters()

    def cost_settings(self, *, world: int, sizes: BatchDims) -> CostSettings:
        """Return the settings of a step on so many ranks."""
        return CostSettings(
            model=self.model,
            parallel=self.parallel,
            precision=self.precision,
            optimizer=self.optimizer,
            sizes=sizes,
            micro_batches=self.gradient_accumulation_steps,
            world=world,
            trainable=self.trainable,
        )


def scale_report(settings: CostSettings) -> dict[str, Any]:
    """Return the memory, communication and FLOPs of rank 0."""
    inventory = inventory_of(settings.model, trainable=settings.trainable)
    rank = inventory.on_rank(settings.parallel, world=settings.world)
    cost = step_cost(settings)
    return {
        "world": settings.world,
        "plan": rank.parallel.acronym,
        "parameters": count_parameters(settings.model).total,
        "mesh": _mesh_axes(rank),
        "batch": asdict(settings.sizes) | {"micro_batches": settings.micro_batches},
        "precision": settings.precision.to_dict(),
        "bytes": bytes_by_purpose(cost),
        "sent": [asdict(line) for line in cost.sent],
        "sent_total": sum(line.bytes for line in cost.sent),
        "flops": cost.flops(),
        "bubble": cost.bubble,
    }


def bytes_by_purpose(cost: StepCost) -> dict[str, int]:
    """Return the bytes of each purpose in all tiers, and the peaks of device and host."""
    held = {purpose.value: cost.held_bytes(purpose=purpose) for purpose in Purpose}
    return held | {"device": cost.peak[DEVICE], "host": cost.peak.get(HOST, 0)}


def _mesh_axes(rank: RankParameters) -> dict[str, dict[str, int]]:
    numbers = sorted(set(rank.inventory.expert_modules.values()))
    layers = {f"layers of {number} experts": rank.grid(number).axes for number in numbers}
    return {"dense layers": rank.grid().axes} | layers
