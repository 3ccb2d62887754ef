"""Training of gpu_memory.py: a model under a memory plan, on equal batches."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from moesaic.data.batch import Batch
from moesaic.distributed.world import SingleProcess
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.model.config import ModelConfig
from moesaic.model.parameter_flop_count import BatchDims, count_parameters
from moesaic.optim.optimizer import AdamW
from moesaic.parallel.activation_checkpointing import CheckpointBlocks
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.precision import Precision
from moesaic.planner.dry_run import dummy_batch
from moesaic.testing.tiny_models import tiny_run
from moesaic.train.run_training import seeded_trainer
from moesaic.train.trainer import Trainer
from moesaic.verify.synthetic_batches import SyntheticBatches

GIB = 2**30
OPTIMIZER = AdamW(lr=1e-4)


class EqualBatches(SyntheticBatches):
    """The same full batch at every step."""

    def __init__(self, config: ModelConfig, sizes: BatchDims) -> None:
        super().__init__()
        self._batch = dummy_batch(config, sizes)

    def full_batch(self, number: int) -> Batch:  # noqa: ARG002
        return self._batch


@dataclass(frozen=True)
class Setting:
    """A model with its plan on the device."""

    model: ModelConfig
    memory: MemoryPlan
    precision: Precision
    sizes: BatchDims
    device: torch.device

    @property
    def parallel(self) -> ParallelConfig:
        """The plan of one process, with every block recomputed."""
        return ParallelConfig(memory=self.memory, activation_checkpointing=CheckpointBlocks())

    def trainer(self) -> Trainer:
        """Return a trainer on equal batches."""
        run = tiny_run(
            model=self.model,
            optimizer=OPTIMIZER,
            precision=self.precision,
            parallel=self.parallel,
        )
        return seeded_trainer(
            run,
            make_loader=lambda _: EqualBatches(self.model, self.sizes),
            world=SingleProcess(self.device),
        )


@contextmanager
def released(device: torch.device) -> Iterator[None]:
    """Give back all memory of the device afterwards."""
    try:
        yield
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def seconds_of_steps(trainer: Trainer, *, count: int, device: torch.device) -> list[float]:
    """Train some steps; return the seconds of each."""
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        trainer.train_step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return seconds


def steps(setting: Setting, *, count: int) -> dict[str, Any]:
    """Train some steps; return parameters, seconds of each, and the peak of the allocator."""
    on_gpu = setting.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(setting.device)
    seconds = seconds_of_steps(setting.trainer(), count=count, device=setting.device)
    peak = torch.cuda.max_memory_allocated(setting.device) if on_gpu else 0
    return {
        "parameters": count_parameters(setting.model).total,
        "seconds": [round(s, 3) for s in seconds],
        "tokens_per_s": round(setting.sizes.tokens / min(seconds[1:] or seconds)),
        "peak_gib": round(peak / GIB, 2),
    }
