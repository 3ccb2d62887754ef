"""Law: a training step without capacity limits reads values on the host in these places only.

On a GPU the host waits wherever it reads a value or a size that depends on one. A new place fails
here: keep the value on the device, or state why the host needs it.
"""

import torch

from cost_counters import HostReads
from moe.variants import (
    BALANCES,
    DIM,
    EXPERTS,
    LAYER_PARTS,
    LIMITS,
    SELECTS,
    balanced,
    layer,
    mixture,
    run,
)
from moesaic.distributed.forked_ranks import run_cases_on_ranks
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess, World
from moesaic.moe.auxiliary_losses import RouterZLoss, SwitchBalance
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.optim.optimizer import Muon
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.expert_dispatch import (
    AdaptiveExperts,
    AllToAll,
    ChunkedAllToAll,
    HierarchicalAllToAll,
)
from moesaic.testing.tiny_models import tiny_model_config, tiny_run, tiny_trainer

MICRO_BATCHES, LAYERS = 2, 2
ON_THE_HOST = {  # reads of tensors that are in host memory on a GPU as well
    "data/batch.py:num_tokens": 2 * MICRO_BATCHES,
    "nn/packing.py:from_mask": 2 * MICRO_BATCHES,  # of the lengths before they are copied
    "train/step.py:forward_backward": 1,  # the predictions of all ranks
}
ON_A_CPU = {
    "ops/cpu/cpu_moe_kernel.py:__call__",
    "ops/cpu/cpu_moe_kernel.py:_sort_edges",
    "ops/grouped_gemm.py:expert_slices",
    "optim/update_rules.py:<listcomp>",
}
WAITS = {
    # which states are read: once before a step on the host, once in forward
    "data/batch.py:num_predicted": 2 * MICRO_BATCHES,
    "model/head.py:select": MICRO_BATCHES,
    "parallel/parallel_model.py:clip_gradients": 1,  # whether the step is skipped
}
CALLS = LAYERS * MICRO_BATCHES
# A dispatch waits once a call, an adaptive one once more to choose; other reads are on the host.
SIZES = {
    AllToAll(): {"moe/all_to_all_dispatcher.py:_plan": CALLS},
    HierarchicalAllToAll(ranks_per_node=1): {"moe/all_to_all_dispatcher.py:exchange": CALLS},
    ChunkedAllToAll(): {
        "moe/chunked_dispatcher.py:_chunk_plan": 2 * CALLS,
        "moe/chunked_dispatcher.py:_chunk_layout": 8 * CALLS,
        "moe/chunked_dispatcher.py:<genexpr>": 2 * CALLS,
    },
    AdaptiveExperts(): {
        "moe/adaptive_dispatcher.py:choose": CALLS,
        "moe/adaptive_dispatcher.py:traffic": 6 * CALLS,
        "moe/all_to_all_dispatcher.py:_plan": CALLS,
    },
}


def _reads(parallel: ParallelConfig) -> dict[str, int]:
    world: World = ProcessGroupWorld() if torch.distributed.is_initialized() else SingleProcess()
    moe = MoE(experts=4, select=TopK(k=2), balance=(SwitchBalance(), RouterZLoss()))
    trainer = tiny_trainer(
        tiny_run(
            model=tiny_model_config(moe=moe),
            optimizer=Muon(lr=0.01),
            parallel=parallel,
            clip_norm=0.1,
            gradient_accumulation_steps=MICRO_BATCHES,
        ),
        world=world,
    )
    trainer.train_step()  # the first one selects kernels
    with HostReads() as reads:
        trainer.train_step()
    return {place: n for place, n in reads.places.items() if place not in ON_A_CPU}


def test_a_dropless_step_waits_for_no_device() -> None:
    assert _reads(ParallelConfig()) == ON_THE_HOST | WAITS


def test_a_dispatch_waits_for_no_device_but_for_the_sizes_that_it_sends() -> None:
    plans = [ParallelConfig(plan=ParallelPlan(expert=2), dispatch=dispatch) for dispatch in SIZES]
    for found, (dispatch, sizes) in zip(
        run_cases_on_ranks(2, _reads, plans), SIZES.items(), strict=True
    ):
        assert found[0] == ON_THE_HOST | WAITS | sizes, dispatch


RULES = {
    **{name: mixture(name, "dropless") for name in SELECTS},
    **{name: balanced(name) for name in BALANCES if name != "adaptive"},
    **{name: MoE(experts=EXPERTS, **parts) for name, parts in LAYER_PARTS.items()},
    **{name: mixture("top2", name) for name in LIMITS},  # of one rank
}
NUMBER_OF_EDGES = {"moe/routing.py:from_mask": 1}  # how many edges a variable number of experts has
VARIABLE = ("top-p", "top-p-capped", "threshold")
READS_OF_RULES = dict.fromkeys((*VARIABLE, "expert-choice"), NUMBER_OF_EDGES)


def test_a_rule_waits_for_no_device_but_for_the_number_of_edges() -> None:
    found = {}
    for name, rule in RULES.items():
        made, x = layer(rule), torch.randn(20, DIM)
        run(made, x)
        with HostReads() as reads:
            out, record = run(made, x)
            (out.sum() + sum(record.losses.values())).backward()
        places = {place: n for place, n in reads.places.items() if place not in ON_A_CPU}
        found |= {name: places} if places else {}
    assert found == READS_OF_RULES
