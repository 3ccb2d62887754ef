"""Updates ahead of the gradient norm beside updates that wait for it: seconds of a step.

States and gradients are in host memory; a core computes the model, another one updates. Steps with
no clipping hide the update under backward; steps that all clip do it twice. Usage::

    python benchmarks/run_ahead.py [--rounds 15] [--dim 256]
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from support import write_result

from moesaic.bench.paired_timing import measure_in_turns, ratio_to_baseline
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.memory.tier import HostMemory
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.optim.optimizer import AdamW
from moesaic.parallel.config import ParallelConfig
from moesaic.testing.tiny_models import tiny_model_config, tiny_run, tiny_trainer
from moesaic.train.trainer import Trainer

OUT = Path(__file__).parents[1] / "benchmarks/results/run_ahead.json"
HOST = HostMemory()
CLIPPED, FREE = 1e-3, 1e9


def trainer_of(*, dim: int, ahead: bool, clip_norm: float) -> Trainer:
    """Return a trainer with states and gradients in host memory."""
    model = tiny_model_config(moe=MoE(experts=16, select=TopK(k=2)), layers=4).replace(dim=dim)
    kept = 1 << 40 if ahead else 0
    memory = MemoryPlan(gradients=HOST, optimizer_states=HOST, run_ahead_bytes=kept)
    return tiny_trainer(
        tiny_run(
            model=model,
            steps=10_000,
            clip_norm=clip_norm,
            optimizer=AdamW(),
            parallel=ParallelConfig(memory=memory),
        )
    )


def main() -> None:
    """Time steps of all three in turns and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dim", type=int, default=256)
    given = parser.parse_args()
    torch.set_num_threads(1)
    trainers = {
        "waits": trainer_of(dim=given.dim, ahead=False, clip_norm=FREE),
        "ahead": trainer_of(dim=given.dim, ahead=True, clip_norm=FREE),
        "ahead, all rolled back": trainer_of(dim=given.dim, ahead=True, clip_norm=CLIPPED),
    }
    for trainer in trainers.values():
        trainer.train_step()  # makes the states
    steps = {name: trainer.train_step for name, trainer in trainers.items()}
    times = measure_in_turns(steps, baseline="waits", rounds=given.rounds)
    base = times["waits"]
    ratios = {n: asdict(ratio_to_baseline(t, base)) for n, t in times.items() if n != "waits"}
    parameters = sum(p.numel() for p in trainers["waits"].model.parameters())
    seconds = min(base.seconds.values())
    write_result(OUT, {"parameters": parameters, "least_seconds": seconds, "ratios": ratios})


if __name__ == "__main__":
    main()
