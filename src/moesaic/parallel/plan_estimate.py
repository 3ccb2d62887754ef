"""Memory and communication of rank 0 under a parallel plan, as JSON data: ``moesaic scale``."""

import math
from dataclasses import asdict
from typing import Any

from pydantic import Field

from moesaic.core.config import Config
from moesaic.model.config import ModelConfig
from moesaic.model.parameter_flop_count import BatchDims
from moesaic.optim.optimizer import AdamW, Optimizer
from moesaic.parallel.communication_volume import communication_volume
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.memory_estimate import estimate_memory
from moesaic.parallel.parameter_inventory import ParameterInventory, RankParameters
from moesaic.parallel.precision import Float32, Precision


class ScaleConfig(Config):
    """What an estimate depends on: model, plan, precision, optimizer, gradient accumulation."""

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: Precision = Float32()
    optimizer: Optimizer = AdamW()
    gradient_accumulation_steps: int = Field(default=1, ge=1)


def estimate_plan(config: ScaleConfig, *, world_size: int, sizes: BatchDims) -> dict[str, Any]:
    """Return the memory and communication of rank 0 as JSON data."""
    micro_batches = config.gradient_accumulation_steps
    rank = ParameterInventory(config.model).on_rank(config.parallel, world=world_size)
    memory = estimate_memory(
        rank, sizes=sizes, precision=config.precision, optimizer=config.optimizer
    )
    lines = communication_volume(rank, sizes=sizes, micro_batches=micro_batches)
    return {
        "world": world_size,
        "plan": rank.parallel.acronym,
        "parameters": sum(math.prod(part.parameter.placement.shape) for part in rank.shards),
        "mesh": _mesh_axes(rank),
        "batch": asdict(sizes) | {"micro_batches": micro_batches},
        "precision": config.precision.to_dict(),
        "bytes": asdict(memory) | {"state": memory.state, "device": memory.device},
        "sent": [asdict(line) for line in lines],
        "sent_total": sum(line.bytes for line in lines),
    }


def _mesh_axes(rank: RankParameters) -> dict[str, dict[str, int]]:
    numbers = sorted(set(rank.inventory.expert_modules.values()))
    layers = {f"layers of {number} experts": rank.grid(number).axes for number in numbers}
    return {"dense layers": rank.grid().axes} | layers
