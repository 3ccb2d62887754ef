"""Law: a training step without capacity limits reads values on the host in these places only.

On a GPU the host waits wherever it reads a value or a size that depends on one. A new place fails
here: keep the value on the device, or state why the host needs it.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
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
from moesaic.checkpoint.run_directory import RunDir
from moesaic.distributed.forked_ranks import RankError, run_cases_on_ranks
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess, World
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.memory.tier import HostMemory
from moesaic.moe.auxiliary_losses import RouterZLoss, SwitchBalance
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.optim.master_weights import StochasticRounding
from moesaic.optim.optimizer import AdamW, Muon
from moesaic.parallel.activation_checkpointing import CheckpointBlocks
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.expert_dispatch import (
    AdaptiveExperts,
    AllToAll,
    ChunkedAllToAll,
    HierarchicalAllToAll,
)
from moesaic.parallel.low_rank_adaptation import LoRA
from moesaic.parallel.precision import BFloat16, BFloat16Autocast
from moesaic.testing.tiny_models import tiny_model_config, tiny_run, tiny_trainer
from moesaic.train.bad_steps import SkipSpikes
from moesaic.train.loop import training_loop
from moesaic.train.run import LogConfig
from moesaic.train.run_training import standard_hooks
from moesaic.train.trainer import StepReport, Trainer
from moesaic.train.training_hooks import Hook

MICRO_BATCHES, LAYERS = 2, 2
CALLS = LAYERS * MICRO_BATCHES
MOE = MoE(experts=4, select=TopK(k=2), balance=(SwitchBalance(), RouterZLoss()))
HOST = HostMemory()
ON_THE_HOST = {  # reads of batches, which are in host memory on a GPU as well
    "data/batch.py:num_tokens": 2 * MICRO_BATCHES,
    "data/batch.py:num_predicted": 2 * MICRO_BATCHES,
    "model/head.py:select": MICRO_BATCHES,
    "nn/packing.py:from_mask": 2 * MICRO_BATCHES,
}
ON_A_CPU = {
    "ops/cpu/cpu_moe_kernel.py:__call__",
    "ops/cpu/cpu_moe_kernel.py:_sort_edges",
    "ops/grouped_gemm.py:expert_slices",
    "optim/update_rules.py:<listcomp>",
    "optim/named_optimizer.py:_float32_values",  # a copy in host memory of what is there
}
WAITS = {
    "parallel/parallel_model.py:clip_gradients": 1,  # whether the step is skipped
    # of a sum that was begun before that, in this step and in the one before it
    "train/loop.py:training_loop": 2,
}
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
SPANS = {"parallel/context_parallel.py:_token_spans": 4 * MICRO_BATCHES}  # of a host's packing
AWAY = MemoryPlan(optimizer_states=HOST, gradients=HOST)
ONE_PROCESS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "Muon": ({}, {}),
    "AdamW": ({"optimizer": AdamW()}, {}),
    "bfloat16": ({"precision": BFloat16()}, {}),
    "rounded at random": ({"precision": BFloat16(master=StochasticRounding())}, {}),
    "autocast": ({"precision": BFloat16Autocast()}, {}),
    "an adapter": ({"trainable": LoRA(rank=2)}, {}),
    "recomputed": ({"parallel": ParallelConfig(activation_checkpointing=CheckpointBlocks())}, {}),
    "spikes": ({"spikes": SkipSpikes()}, {"train/trainer.py:_global_loss": 1}),
    "states on the host": ({"parallel": ParallelConfig(memory=AWAY)}, {}),
}
TWO_RANKS: dict[str, tuple[ParallelConfig, dict[str, int]]] = {
    "data": (ParallelConfig(), {}),
    "ZeRO 1": (ParallelConfig(plan=ParallelPlan(zero=1)), {}),
    "ZeRO 2": (ParallelConfig(plan=ParallelPlan(zero=2)), {}),
    "ZeRO 3": (ParallelConfig(plan=ParallelPlan(zero=3)), {}),
    "tensor": (
        ParallelConfig(plan=ParallelPlan(tensor=2)),
        SPANS | {"model/head.py:<genexpr>": 2 * MICRO_BATCHES},
    ),
    "context": (
        ParallelConfig(plan=ParallelPlan(context=2)),
        SPANS | {"model/head.py:<genexpr>": MICRO_BATCHES},
    ),
    **{
        type(dispatch).__name__: (
            ParallelConfig(plan=ParallelPlan(expert=2), dispatch=dispatch),
            sizes,
        )
        for dispatch, sizes in SIZES.items()
    },
}


class _SecondStep(Hook):
    """Counts the reads of the second step and of all hooks after it: the first selects kernels."""

    def __init__(self) -> None:
        self.reads = HostReads()

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        del trainer
        if report.step == 1:
            self.reads.__enter__()

    def after_run(self, trainer: Trainer) -> None:
        del trainer
        self.reads.__exit__(None, None, None)


def _reads(changes: dict[str, Any]) -> dict[str, int]:
    """Return the reads of a step of a run with its usual hooks, of which none is due."""
    world: World = ProcessGroupWorld() if torch.distributed.is_initialized() else SingleProcess()
    base: dict[str, Any] = {
        "model": tiny_model_config(moe=MOE),
        "optimizer": Muon(lr=0.01),
        "clip_norm": 0.1,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "log": LogConfig(every=100, routing_stats_every=100),
    }
    trainer, second = tiny_trainer(tiny_run(**base | changes), world=world), _SecondStep()
    with TemporaryDirectory() as folder:
        hooks = standard_hooks(trainer, run_dir=RunDir(Path(folder)))
        training_loop(trainer, hooks=[*hooks, second], until=2)
    return {place: n for place, n in second.reads.places.items() if place not in ON_A_CPU}


@pytest.mark.parametrize("name", ONE_PROCESS)
def test_a_dropless_step_waits_for_no_device(name: str) -> None:
    changes, more = ONE_PROCESS[name]
    assert _reads(changes) == ON_THE_HOST | WAITS | more


def test_a_rank_waits_for_no_device_but_for_the_sizes_that_it_sends() -> None:
    plans = [{"parallel": parallel} for parallel, _ in TWO_RANKS.values()]
    found = run_cases_on_ranks(2, _reads, plans)
    for reads, (name, (_, more)) in zip(found, TWO_RANKS.items(), strict=True):
        assert not isinstance(reads, RankError), reads
        assert reads[0] == ON_THE_HOST | WAITS | more, name


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
