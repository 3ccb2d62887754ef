"""The forecast of an optimizer that updates whole matrices equals what all its ranks count."""

import pytest
import torch

from cost_counters import count_flops
from moesaic.distributed.communication_counter import CommunicationCounter
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.distributed.simulation import fake_process_group
from moesaic.distributed.world import ProcessGroupWorld
from moesaic.model.transformer import Transformer
from moesaic.nn.fused_projections import fused_outputs
from moesaic.optim.optimizer import Muon
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.matrix_owners import MatrixOwners
from moesaic.parallel.parallelize import parallelize
from moesaic.parallel.parameter_inventory import ParameterInventory
from moesaic.planner.owner_update import owner_communication, owner_operations
from moesaic.testing.tiny_models import tiny_model_config

PLANS = {
    "copies": ParallelPlan(data=2),
    "ZeRO": ParallelPlan(data=4, zero=3),
    "experts": ParallelPlan(data=4, expert=2),
    "tensor": ParallelPlan(data=2, tensor=2),
}


def _counted(parallel: ParallelConfig, rank: int) -> tuple[int, int]:
    """The FLOPs and the bytes sent of a rank's second update."""
    world = parallel.plan.world_size
    with fake_process_group(world, rank=rank):
        model = Transformer(tiny_model_config())
        fused = fused_outputs(model)
        parallel_model = parallelize(model, parallel=parallel, world=ProcessGroupWorld())
        matrices = (named for named in model.named_parameters() if named[1].ndim > 1)
        optimizer = Muon().build(matrices, kinds=model.parameter_kinds())
        optimizer.matrix_sharding = MatrixOwners(parallel_model)
        optimizer.fused_outputs = fused
        optimizer.param_groups[:] = [g for g in optimizer.param_groups if "muon" in g["name"]]
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        with CommunicationCounter() as sent:
            return count_flops(optimizer.step), sent.total_bytes()


@pytest.mark.parametrize("name", PLANS)
def test_the_forecast_of_all_ranks_is_what_they_count(name: str) -> None:
    parallel = ParallelConfig(plan=PLANS[name])
    inventory, world = ParameterInventory(tiny_model_config()), PLANS[name].world_size
    counted, forecast = [], []
    for rank in range(world):
        counted.append(_counted(parallel, rank))
        part = inventory.on_rank(parallel, world=world, rank=rank)
        flops = sum(o.flops * times for o, times in owner_operations(part, Muon()))
        forecast.append((flops, sum(v.bytes for v in owner_communication(part, Muon()))))
    flops, sent = (sum(column) for column in zip(*counted, strict=True))
    expected_flops, most_sent = (sum(column) for column in zip(*forecast, strict=True))
    assert flops == pytest.approx(expected_flops, rel=1e-6)
    # ZeRO cuts queries, keys and values unevenly: an owner has more of a map than its share
    least = 0.75 * most_sent if name == "ZeRO" else most_sent
    assert least <= sent <= most_sent
