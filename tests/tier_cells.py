"""Training under a memory plan and a parallel plan beside the same steps with all on the device."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic.core.shapes import Tensor
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess, World, local_tensor
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.memory.tier import DiskStorage, HostMemory
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import SwitchTop1
from moesaic.optim.optimizer import AdamW, EightBitStates, Muon, Optimizer
from moesaic.optim.optimizer_state import live_state
from moesaic.parallel.config import ParallelConfig
from moesaic.testing.tiny_models import tiny_model_config, tiny_run, tiny_trainer
from moesaic.train.loop import training_loop
from moesaic.train.run import Run
from moesaic.train.trainer import Trainer
from moesaic.train.training_hooks import CheckpointHook

HOST, DISK = HostMemory(), DiskStorage()
RESIDENT = MemoryPlan()
TIERS = {
    "host": MemoryPlan(gradients=HOST, optimizer_states=HOST),
    "disk": MemoryPlan(gradients=DISK, optimizer_states=DISK, in_flight_bytes=10_000),
    "gradients on host, states on disk": MemoryPlan(gradients=HOST, optimizer_states=DISK),
    "states on host": MemoryPlan(optimizer_states=HOST),
    "gradients on host": MemoryPlan(gradients=HOST),
    "weights on disk": MemoryPlan(parameters=DISK),
    "all away": MemoryPlan(
        parameters=HOST, gradients=HOST, optimizer_states=DISK, activations=HOST
    ),
    "late on host": MemoryPlan(gradients=HOST, optimizer_states=HOST, late_steps=8),
    "late on disk": MemoryPlan(
        gradients=DISK, optimizer_states=DISK, in_flight_bytes=10_000, late_steps=2
    ),
    "late, all away": MemoryPlan(
        parameters=HOST, gradients=HOST, optimizer_states=DISK, activations=HOST, late_steps=3
    ),
    "ahead on host": MemoryPlan(gradients=HOST, optimizer_states=HOST, run_ahead_bytes=1 << 30),
    "ahead on disk": MemoryPlan(
        gradients=DISK, optimizer_states=DISK, in_flight_bytes=10_000, run_ahead_bytes=200_000
    ),
    "ahead, late, all away": MemoryPlan(
        parameters=HOST,
        gradients=HOST,
        optimizer_states=DISK,
        activations=HOST,
        late_steps=3,
        run_ahead_bytes=1 << 30,
    ),
}
EXPERTS = 32
# few tokens for many experts: some have none for several steps
MODEL = tiny_model_config(moe=MoE(experts=EXPERTS, select=SwitchTop1()))
# rows of 16 and 32 values have a shorter last block
EIGHT_BIT = AdamW(lr=1e-2, states=EightBitStates(block=12))
PLANS: dict[str, tuple[int, dict[str, int], Optimizer]] = {
    "one process": (1, {}, AdamW(lr=1e-2)),
    "one process, Muon": (1, {}, Muon(lr=1e-2)),
    "data": (2, {}, AdamW(lr=1e-2)),
    "experts without copies": (2, {"expert": 2}, Muon(lr=1e-2)),
    "ZeRO 1": (2, {"zero": 1}, AdamW(lr=1e-2)),
    "ZeRO 3, Muon": (2, {"zero": 3}, Muon(lr=1e-2)),
    "ZeRO 2, experts without copies": (2, {"zero": 2, "expert": 2}, AdamW(lr=1e-2)),
    "ZeRO 3, experts without copies": (2, {"zero": 3, "expert": 2}, AdamW(lr=1e-2)),
    "tensor": (2, {"tensor": 2}, AdamW(lr=1e-2)),
    "pipeline": (2, {"pipe": 2}, AdamW(lr=1e-2)),
    "one process, 8-bit": (1, {}, EIGHT_BIT),
    "ZeRO 3, 8-bit": (2, {"zero": 3}, EIGHT_BIT),
    "ZeRO 2, experts without copies, 8-bit": (2, {"zero": 2, "expert": 2}, EIGHT_BIT),
}


@dataclass(frozen=True)
class Outcome:
    """What steps lead to: the metrics of each (loss, norm) and all tensors at the end."""

    metrics: list[dict[str, float]]
    tensors: Mapping[str, Tensor]

    def differences(self, other: "Outcome") -> list[str]:
        """Return what is not equal bit for bit."""
        found = [] if self.metrics == other.metrics else ["metrics"]
        names = self.tensors.keys() | other.tensors.keys()
        return found + sorted(
            name
            for name in names
            if name not in self.tensors
            or name not in other.tensors
            or not torch.equal(self.tensors[name], other.tensors[name])
        )


def run_of(plan: str, memory: MemoryPlan, **changes: Any) -> Run:
    """Return a run with accumulation and clipping."""
    _, degrees, optimizer = PLANS[plan]
    return tiny_run(
        steps=50,
        gradient_accumulation_steps=2,
        clip_norm=0.5,
        model=MODEL,
        optimizer=optimizer,
        parallel=ParallelConfig(plan=ParallelPlan(**degrees), memory=memory),
    ).replace(**changes)


def trainer_of(plan: str, memory: MemoryPlan, **changes: Any) -> Trainer:
    """Return a trainer of ``run_of`` on the ranks of this process group."""
    run = run_of(plan, memory, **changes)
    world: World = ProcessGroupWorld() if torch.distributed.is_initialized() else SingleProcess()
    return tiny_trainer(run, world=world)


def train(trainer: Trainer, *, steps: int) -> Outcome:
    """Train some steps."""
    metrics = []
    for _ in range(steps):
        trainer.train_step()
        row = trainer.metrics.compute_and_reset(trainer.world)
        metrics.append({k: v for k, v in row.items() if not k.startswith(("perf", "time"))})
    weights = {name: local_tensor(p).detach() for name, p in trainer.model.named_parameters()}
    states = {name: t.clone() for name, t in live_state(trainer.optimizer).items()}
    return Outcome(metrics, weights | states)


def resume_in(trainer: Trainer, other: Trainer, folder: Path, *, step: int) -> Trainer:
    """Train the one to a checkpoint at ``step``, and continue from it in the other."""
    training_loop(trainer, hooks=[CheckpointHook(folder, flush=lambda: None)], until=step)
    other.load_checkpoint(folder / f"step-{trainer.step:08d}")
    return other
