"""Muon's update of a sharded matrix is that of the full matrix."""

import pytest
import torch

from moesaic.core.shapes import Tensor
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess, World
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.optim.optimizer import Muon
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.sharding_plan import write_shard
from moesaic.testing.tiny_models import tiny_model_config, tiny_run, tiny_trainer

PLANS = {
    2: [
        ParallelPlan(),
        ParallelPlan(tensor=2, expert=2),
        ParallelPlan(zero=3, expert=2),
        ParallelPlan(zero=2, tensor=2, expert_tensor=2),
        ParallelPlan(zero=1, expert=1),
    ],
    5: [ParallelPlan(zero=1)],  # a rank has none of them
}


def _weights(plan: ParallelPlan, experts: int) -> dict[str, Tensor]:
    world: World = ProcessGroupWorld() if torch.distributed.is_initialized() else SingleProcess()
    model = tiny_model_config(moe=MoE(experts=experts, select=TopK(k=2)))
    run = tiny_run(model=model, optimizer=Muon(lr=0.01), parallel=ParallelConfig(plan=plan))
    trainer = tiny_trainer(run, world=world)
    for _ in range(2):
        trainer.train_step()
    weights = {}
    for name, shard in trainer.parallel_model.shards().items():
        full, copies = torch.zeros(shard.shape), torch.zeros(shard.shape)
        write_shard(full, shard)
        for block in shard.blocks:
            index = tuple(
                slice(o, o + n) for o, n in zip(block.offset, block.data.shape, strict=True)
            )
            copies[index] += 1
        weights[name] = world.all_reduce(full) / world.all_reduce(copies)
    return weights


def _all_plans(experts: int) -> list[dict[str, Tensor]]:
    return [_weights(plan, experts) for plan in PLANS[experts]]


@pytest.mark.parametrize("experts", PLANS)
def test_muon_of_sharded_matrices_is_muon_of_full_matrices(experts: int) -> None:
    expected = _weights(ParallelPlan(), experts)
    sharded, *_ = run_on_ranks(4, _all_plans, experts, timeout_s=120)
    for plan, weights in zip(PLANS[experts], sharded, strict=True):
        for name, value in expected.items():
            torch.testing.assert_close(
                weights[name], value, rtol=1e-4, atol=1e-5, msg=f"{plan} {name}"
            )
