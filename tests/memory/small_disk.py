"""Trains with optimizer states on a file system that becomes full, and resumes: a child's program.

Usage: ``python small_disk.py FOLDER``, with the file system mounted at ``FOLDER/disk``.
"""

import sys
from pathlib import Path

import torch

from moesaic.memory.disk_store import DiskFullError
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.memory.tier import DiskStorage
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import SwitchTop1
from moesaic.optim.optimizer_state import live_state
from moesaic.parallel.config import ParallelConfig
from moesaic.testing.tiny_models import tiny_model_config, tiny_run, tiny_trainer
from moesaic.train.loop import training_loop
from moesaic.train.training_hooks import CheckpointHook

BLOCK = bytes(4096)


def main() -> None:
    """Print the step after which the disk was full, whether it resumes equally, the message."""
    folder = Path(sys.argv[1])
    disk = DiskStorage(folder=str(folder / "disk"))
    # an expert takes room when it is first updated: some experts have no tokens for some steps
    memory = MemoryPlan(optimizer_states=disk, late_steps=1000)
    model = tiny_model_config(moe=MoE(experts=128, select=SwitchTop1()))
    run = tiny_run(model=model, steps=100, parallel=ParallelConfig(memory=memory))
    trainer = tiny_trainer(run)
    trainer.train_step()
    with (folder / "disk" / "other").open("wb", buffering=0) as file:
        try:
            while file.write(BLOCK):
                pass
        except OSError:  # full
            pass
    try:
        training_loop(trainer, hooks=[CheckpointHook(folder, flush=lambda: None)], until=100)
    except DiskFullError as error:
        resumed, resident = (tiny_trainer(run.replace(parallel=ParallelConfig())) for _ in range(2))
        resumed.load_checkpoint(folder / f"step-{trainer.step:08d}")
        resumed.train_step()
        while resident.step < resumed.step:
            resident.train_step()
        states = (live_state(each.optimizer).values() for each in (resumed, resident))
        print(trainer.step, all(map(torch.equal, *states)), error, sep="\n")


if __name__ == "__main__":
    main()
