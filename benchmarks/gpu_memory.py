"""Memory tiers on one GPU, in under eight minutes: the ratios of a limit, and the 10B shape.

    python benchmarks/gpu_memory.py --out benchmarks/results/gpu_memory.json
    python benchmarks/gpu_memory.py --tiny --device cpu --out /dev/null      # a rehearsal

1. The largest model that takes a step within ``--budget`` GiB of the card: resident, states and
   gradients on the host, weights streamed too. The allocator is limited; the count of layers grows
   until it refuses.
2. Z-code M3 with 64 experts (24 + 12 layers) takes ``--steps`` steps on the card, its states and
   gradients in host memory. Without float32 masters (``StochasticRounding``) it needs 100 GB there.
   Tokens per second stand beside the forecast of ``--machine``.
"""

import argparse
import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from memory_headline import model_config, plans
from support import write_result

from moesaic.core.errors import ConfigError
from moesaic.data.batch import Batch
from moesaic.distributed.world import SingleProcess
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.memory.tier import HostMemory
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.parameter_flop_count import BatchDims, count_parameters
from moesaic.model.presets import preset
from moesaic.optim.master_weights import StochasticRounding
from moesaic.optim.optimizer import AdamW
from moesaic.parallel.activation_checkpointing import CheckpointBlocks
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.precision import BFloat16, Precision
from moesaic.planner.dry_run import dummy_batch
from moesaic.planner.machine import find_machine
from moesaic.planner.step_cost import CostSettings, step_cost
from moesaic.planner.step_time import step_time
from moesaic.testing.tiny_models import tiny_run
from moesaic.train.run_training import seeded_trainer
from moesaic.train.trainer import Trainer
from moesaic.verify.synthetic_batches import SyntheticBatches

GIB = 2**30


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

    def trainer(self) -> Trainer:
        """Return a trainer on equal batches."""
        parallel = ParallelConfig(memory=self.memory, activation_checkpointing=CheckpointBlocks())
        run = tiny_run(
            model=self.model,
            optimizer=AdamW(lr=1e-4),
            precision=self.precision,
            parallel=parallel,
        )
        return seeded_trainer(
            run,
            make_loader=lambda _: EqualBatches(self.model, self.sizes),
            world=SingleProcess(self.device),
        )


def steps(setting: Setting, *, count: int) -> dict[str, Any]:
    """Train some steps; return parameters, seconds of each, and the peak of the allocator."""
    on_gpu = setting.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(setting.device)
    trainer, seconds = setting.trainer(), []
    for _ in range(count):
        started = time.perf_counter()
        trainer.train_step()
        if on_gpu:
            torch.cuda.synchronize(setting.device)
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated(setting.device) if on_gpu else 0
    return {
        "parameters": count_parameters(setting.model).total,
        "seconds": [round(s, 3) for s in seconds],
        "tokens_per_s": round(setting.sizes.tokens / min(seconds[1:] or seconds)),
        "peak_gib": round(peak / GIB, 2),
    }


def largest(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Return the largest model that takes a step with a plan; layers grow by a half."""
    device, best, layers = torch.device(given.device), None, given.layers
    plan = plans(given.folder, in_flight=GIB // 4)[name]
    while layers <= given.most_layers and (best is None or "failure" not in best):
        config = model_config(layers, experts=given.experts, dim=given.dim)
        setting = Setting(config, plan, BFloat16(), BatchDims(4, 64, 64), device)
        try:
            found = steps(setting, count=1)
        except (torch.OutOfMemoryError, MemoryError) as error:
            return {"largest": best, "failed_at_layers": layers, "failure": str(error)[:120]}
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        best, layers = found | {"layers": layers}, layers + max(1, layers // 2)
    return {"largest": best, "failure": "none: the search ended"}


def ten_billion(given: argparse.Namespace) -> dict[str, Any]:
    """Train the 10B shape; return its measured and forecast rates."""
    config = preset("zcode-m3-64").config
    if given.tiny:
        config = config.replace(
            dim=32, vocab_size=64, encoder=Stack(layers=2, moe_every=2), decoder=Stack(layers=1)
        )
    host = HostMemory()
    setting = Setting(
        config,
        MemoryPlan(gradients=host, optimizer_states=host),
        BFloat16(master=StochasticRounding()),
        BatchDims(2, 16, 16) if given.tiny else BatchDims(64, 256, 256),
        torch.device(given.device),
    )
    measured = steps(setting, count=given.steps)
    parallel = ParallelConfig(memory=setting.memory, activation_checkpointing=CheckpointBlocks())
    settings = CostSettings(model=config, parallel=parallel, sizes=setting.sizes)
    try:
        cost = step_cost(settings)
    except ConfigError as error:  # what cannot be priced has no forecast
        return measured | {"forecast": str(error)}
    machine, plan = find_machine(given.machine), parallel.plan.resolve(1)
    rate = (
        setting.sizes.tokens / step_time(cost, machine=machine, plan=plan, dtype="bfloat16").total
    )
    return measured | {
        "forecast_tokens_per_s": round(rate),
        "measured_over_forecast": round(measured["tokens_per_s"] / rate, 3),
    }


def main() -> None:
    """Run both parts and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_memory.json"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--machine", default="h200")
    parser.add_argument("--budget", type=float, default=8, help="GiB of the card, for part 1")
    parser.add_argument("--folder", default="/tmp")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--most-layers", type=int, default=200)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tiny", action="store_true", help="rehearse: a few seconds on a CPU")
    given = parser.parse_args()
    if given.tiny:
        given.experts, given.dim, given.layers, given.most_layers = 4, 32, 2, 3
    if given.device == "cuda":
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(given.budget * GIB / whole)
    found = {name: largest(name, given) for name in plans(given.folder, in_flight=1)}
    if given.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)
    write_result(given.out, {"under_limit": found, "ten_billion": ten_billion(given)})


if __name__ == "__main__":
    main()
