"""Muon by the owners of matrices equals Muon of one process, also where sizes do not divide."""

import pytest
import torch

from moesaic.distributed.forked_ranks import RankError, run_cases_on_ranks
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess, World
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.moe.shared_experts import SharedExperts
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.optim.optimizer import Muon
from moesaic.parallel.config import ParallelConfig
from moesaic.testing.tiny_models import tiny_model_config, tiny_run, tiny_trainer

STEPS = 3
# six experts over four ranks of ZeRO: two, two, two, none; queries wider than keys and values
MODEL = tiny_model_config(
    moe=MoE(experts=6, select=TopK(k=2), shared_experts=SharedExperts(number=1))
).replace(
    dim=24,
    vocab_size=66,
    attention=AttentionConfig(heads=4, kv_heads=2),
    feed_forward=FeedForwardConfig(hidden=20),
)
PLANS = {
    2: [
        ParallelPlan(),
        ParallelPlan(zero=1),
        ParallelPlan(expert=2, zero=2),
        ParallelPlan(tensor=2),
        ParallelPlan(pipe=2),
    ],
    4: [
        ParallelPlan(zero=1),
        ParallelPlan(zero=3),
        ParallelPlan(expert=2, tensor=2, zero=3),
        ParallelPlan(expert=2, expert_tensor=2, tensor=2),
    ],
}


def _losses(plan: ParallelPlan) -> list[float]:
    """The loss of each step, which depends on all updates before it."""
    world: World = ProcessGroupWorld() if torch.distributed.is_initialized() else SingleProcess()
    run = tiny_run(
        model=MODEL,
        optimizer=Muon(lr=0.02),
        gradient_accumulation_steps=2,
        parallel=ParallelConfig(plan=plan),
    )
    trainer = tiny_trainer(run, world=world)
    results = (trainer.train_step().result for _ in range(STEPS))
    losses = (world.all_reduce(result.sums.losses).sum(1) for result in results)
    return [float(total / count) for total, count in losses]


@pytest.mark.parametrize("ranks", PLANS)
def test_owners_update_as_one_process_does(ranks: int) -> None:
    whole = _losses(ParallelPlan())
    for plan, found in zip(
        PLANS[ranks], run_cases_on_ranks(ranks, _losses, PLANS[ranks]), strict=True
    ):
        assert not isinstance(found, RankError), f"{plan}: {found}"
        assert found[0] == pytest.approx(whole, rel=1e-5), plan
