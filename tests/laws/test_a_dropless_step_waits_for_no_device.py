"""Law: a training step without capacity limits reads values on the host in these places only.

On a GPU the host waits wherever it reads a value or a size that depends on one. A new place fails
here: keep the value on the device, or state why the host needs it.
"""

import pytest
import torch

from cost_counters import HostReads
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess, World
from moesaic.moe.auxiliary_losses import RouterZLoss, SwitchBalance
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.optim.optimizer import Muon
from moesaic.parallel.config import ParallelConfig
from moesaic.testing.tiny_models import tiny_model_config, tiny_run, tiny_trainer

MICRO_BATCHES, LAYERS = 2, 2
ON_THE_HOST = {  # reads of tensors that are in host memory on a GPU as well
    "data/batch.py:num_tokens": 2 * MICRO_BATCHES,
    "nn/packing.py:from_mask": 2 * MICRO_BATCHES,  # of the lengths before they are copied
    "train/step.py:forward_backward": 1,  # the predictions of all ranks
}
ON_A_CPU = {"ops/cpu/cpu_moe_kernel.py:__call__", "optim/update_rules.py:<listcomp>"}
WAITS = {
    # which states are read: once before a step on the host, once in forward
    "data/batch.py:num_predicted": 2 * MICRO_BATCHES,
    "model/head.py:select": MICRO_BATCHES,
    "parallel/parallel_model.py:clip_gradients": 1,  # whether the step is skipped
}
EXCHANGE = {"moe/all_to_all_dispatcher.py:_plan": LAYERS * MICRO_BATCHES}  # sizes of an all-to-all


def _reads(plan: ParallelPlan) -> dict[str, int]:
    world: World = ProcessGroupWorld() if torch.distributed.is_initialized() else SingleProcess()
    moe = MoE(experts=4, select=TopK(k=2), balance=(SwitchBalance(), RouterZLoss()))
    trainer = tiny_trainer(
        tiny_run(
            model=tiny_model_config(moe=moe),
            optimizer=Muon(lr=0.01),
            parallel=ParallelConfig(plan=plan),
            clip_norm=0.1,
            gradient_accumulation_steps=MICRO_BATCHES,
        ),
        world=world,
    )
    trainer.train_step()  # the first one selects kernels
    with HostReads() as reads:
        trainer.train_step()
    return {place: n for place, n in reads.places.items() if place not in ON_A_CPU}


@pytest.mark.parametrize("expert", [1, 2])
def test_a_dropless_step_waits_for_no_device(expert: int) -> None:
    plan = ParallelPlan(expert=expert)
    found = run_on_ranks(expert, _reads, plan)[0] if expert > 1 else _reads(plan)
    assert found == ON_THE_HOST | WAITS | (EXCHANGE if expert > 1 else {})
