"""``trillion-384`` started on fake devices: what ranks allocate beside what is forecast.

Each rank makes its part of the model as training does, with its gradients and its AdamW states;
fake tensors take no memory, and their bytes are counted by storage.

    python benchmarks/started_ranks.py
"""

import time
from pathlib import Path
from typing import Any

import torch
from support import write_result

from moesaic.distributed.mesh import Mesh
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.distributed.simulation import SharedChunks, SimulatedRank, fake_process_group
from moesaic.model.presets import preset
from moesaic.model.transformer import Transformer
from moesaic.optim.optimizer import AdamW
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallelize import expert_counts, parallelize_on_mesh
from moesaic.parallel.parameter_inventory import ParameterInventory

PARALLEL = ParallelConfig(plan=ParallelPlan(expert=128, tensor=8, zero=3))
RANKS = ((1024, 0), (1024, 777), (1024, 1023), (8192, 0), (8192, 4097), (8192, 8191))
OUT = Path(__file__).parent / "results" / "started-ranks.json"


def started(config: Any, *, world: int, rank: int) -> dict[str, Any]:
    """Return the bytes that a rank allocates for weights, buffers, gradients and states."""
    began = time.perf_counter()
    with fake_process_group(world, rank=rank), SimulatedRank() as simulated:
        model = Transformer.without_values(config)
        mesh = Mesh(
            PARALLEL.plan.resolve(world),
            rank=rank,
            device=torch.device("cpu"),
            expert_counts=expert_counts(model),
        )
        mesh.device_mesh("data", "context")  # a mesh has a table of its ranks
        for number in mesh.expert_counts:
            mesh.device_mesh("expert_data", num_experts=number)
        buffers = sum(buffer.nbytes for buffer in model.buffers())
        tables = simulated.ledger.live_bytes - buffers
        with SharedChunks():
            parallelize_on_mesh(model, parallel=PARALLEL, mesh=mesh)
        shared = buffers + tables
        weights = simulated.ledger.live_bytes - shared
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        gradients = simulated.ledger.live_bytes - shared - weights
        optimizer = AdamW().build(model.named_parameters(), kinds=model.parameter_kinds())
        optimizer.step()
        states = simulated.ledger.live_bytes - shared - weights - gradients
        peak = simulated.ledger.peak_bytes
    return {
        "world": world,
        "rank": rank,
        "buffers": buffers,
        "mesh_tables": tables,
        "weights": weights,
        "gradients": gradients,
        "states": states,
        "peak": peak,
        "seconds": time.perf_counter() - began,
    }


def forecast(inventory: ParameterInventory, *, world: int, rank: int) -> dict[str, int]:
    """Return the bytes in float32 of a rank's shards; AdamW has two moments and a step count."""
    shards = inventory.on_rank(PARALLEL, world=world, rank=rank).shards
    values = sum(torch.Size(shard.shape).numel() for shard in shards)
    return {"weights": 4 * values, "gradients": 4 * values, "states": 8 * values + 4 * len(shards)}


def main() -> None:
    config = preset("trillion-384").config
    inventory = ParameterInventory(config)
    rows = []
    for world, rank in RANKS:
        measured = started(config, world=world, rank=rank)
        rows.append(measured | {"forecast": forecast(inventory, world=world, rank=rank)})
        print(rows[-1], flush=True)
    write_result(OUT, {"plan": PARALLEL.plan.to_dict(), "ranks": rows})


if __name__ == "__main__":
    main()
