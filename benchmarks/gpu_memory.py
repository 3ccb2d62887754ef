"""Memory tiers on one GPU, in under eight minutes: right, hidden, a limit's ratios, the 10B shape.

    python benchmarks/gpu_memory.py --out benchmarks/results/gpu_memory.json
    python benchmarks/gpu_memory.py --tiny --device cpu --out /tmp/gpu_memory.json    # a rehearsal

1. ``correctness`` and ``overlap`` of the copies (``gpu_overlap.py``).
2. Z-code M3 with 64 experts (24 + 12 layers) takes ``--steps`` steps on the card, its states and
   gradients in host memory. Without float32 masters (``StochasticRounding``) it needs 100 GB there.
   Tokens per second stand beside the forecast of ``--machine``: at least 0.85 of it are expected.
3. The largest model that takes a step within ``--budget`` GiB of the card: resident, states and
   gradients on the host, weights streamed too. The allocator is limited; the resident model grows
   by a layer until it refuses, then multiples of it are tried with tiers.

The result is written after each part. A part whose forecast seconds are not left is not begun; the
forecasts are written too, and all of them together are under eight minutes.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from gpu_overlap import correctness, overlap
from gpu_training import GIB, OPTIMIZER, Setting, released, steps
from memory_headline import model_config, plans
from support import write_result

from moesaic.core.errors import ConfigError
from moesaic.memory.disk_store import DiskFullError
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.memory.tier import HostMemory
from moesaic.model.config import Stack
from moesaic.model.parameter_flop_count import BatchDims
from moesaic.model.presets import preset
from moesaic.moe.config import MoE
from moesaic.optim.master_weights import StochasticRounding
from moesaic.parallel.precision import BFloat16
from moesaic.planner.cost_entries import HOST
from moesaic.planner.cost_settings import CostSettings
from moesaic.planner.machine import find_machine
from moesaic.planner.step_cost import StepCost, step_cost
from moesaic.planner.step_time import step_time

EXPECTED = 0.85  # of the forecast tokens per second
PINNED_BYTES_PER_SECOND = 2e9  # of pinned memory that is allocated; of a disk that is written
SECONDS = {"correctness": 40, "overlap": 60, "largest": 180}
MULTIPLES = {
    "states and gradients on the host": (6, 8),
    "all away, weights streamed from disk": (12, 20),
}
FAILURES = (torch.OutOfMemoryError, MemoryError, DiskFullError, ConfigError)


def one_step(layers: int, memory: MemoryPlan, given: argparse.Namespace) -> dict[str, Any]:
    """Take a step of a model with so many layers; return it, or why it failed."""
    device = torch.device(given.device)
    config = model_config(layers, experts=given.experts, dim=given.dim)
    with released(device):
        try:
            found = steps(
                Setting(config, memory, BFloat16(), BatchDims(4, 64, 64), device), count=1
            )
        except FAILURES as error:
            return {"layers": layers, "failure": str(error)[:120]}
    return found | {"layers": layers}


def largest(given: argparse.Namespace) -> dict[str, Any]:
    """Return the largest models that take a step within the budget, and the first that fail."""
    if given.device == "cuda":
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(given.budget * GIB / whole)
    memory = plans(given.folder, in_flight=GIB // 16)
    resident = _until_one_fails(range(given.layers, given.most_layers), memory["resident"], given)
    best = (resident["largest"] or {"layers": given.layers})["layers"]
    found = {"resident": resident}
    for name, multiples in MULTIPLES.items():
        found[name] = _until_one_fails([best * each for each in multiples], memory[name], given)
    if given.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)
    return found


def _until_one_fails(
    counts: Iterable[int], memory: MemoryPlan, given: argparse.Namespace
) -> dict[str, Any]:
    best = None
    for layers in counts:
        found = one_step(layers, memory, given)
        if "failure" in found:
            return {"largest": best, "failed": found}
        best = found
    return {"largest": best, "failed": None}


def ten_billion(given: argparse.Namespace) -> Setting:
    """Return the 10B shape on the card."""
    config = preset("zcode-m3-64").config
    if given.tiny:
        config = config.replace(
            dim=32, vocab_size=64, encoder=Stack(layers=2, moe_every=2), decoder=Stack(layers=1)
        )
    host = HostMemory()
    return Setting(
        config,
        MemoryPlan(gradients=host, optimizer_states=host),
        BFloat16(master=StochasticRounding()),
        BatchDims(2, 16, 16) if given.tiny else BatchDims(64, 256, 256),
        torch.device(given.device),
    )


def forecast(setting: Setting, *, machine: str) -> tuple[StepCost, float]:
    """Return the cost of a step on a machine, and its seconds."""
    found, parallel = find_machine(machine), setting.parallel
    cost = step_cost(
        CostSettings(
            model=setting.model,
            parallel=parallel,
            precision=setting.precision,
            optimizer=OPTIMIZER,
            sizes=setting.sizes,
            device=found.device,
        )
    )
    moe = setting.model.moe
    experts = moe.experts if isinstance(moe, MoE) else 1
    plan = parallel.plan.resolve(1)
    return cost, step_time(cost, machine=found, plan=plan, num_experts=experts).total


def measured_ten_billion(setting: Setting, *, count: int, machine: str) -> dict[str, Any]:
    """Train the 10B shape; return its rate beside the forecast one."""
    _, seconds = forecast(setting, machine=machine)
    with released(setting.device):
        measured = steps(setting, count=count)
    ratio = measured["tokens_per_s"] * seconds / setting.sizes.tokens
    return measured | {"measured_over_forecast": round(ratio, 3), "as_expected": ratio >= EXPECTED}


def main() -> None:
    """Run all parts and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_memory.json"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--machine", default="h200")
    parser.add_argument("--budget", type=float, default=2, help="GiB of the card, for part 3")
    parser.add_argument("--folder", default="/tmp")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--most-layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=470)
    parser.add_argument("--tiny", action="store_true", help="rehearse: a few seconds on a CPU")
    given = parser.parse_args()
    if given.tiny:
        given.experts, given.dim, given.layers, given.most_layers = 4, 32, 1, 2
    whole, device = ten_billion(argparse.Namespace(**vars(given) | {"tiny": False})), given.device
    cost, seconds = forecast(whole, machine=given.machine)
    start = cost.peak[HOST] / PINNED_BYTES_PER_SECOND
    expected = {**SECONDS, "ten_billion": round(start + given.steps * seconds)}
    result: dict[str, Any] = {
        "ten_billion_forecast": {
            "seconds": round(seconds, 3),
            "tokens_per_s": round(whole.sizes.tokens / seconds),
            "gib": {tier: round(size / GIB, 1) for tier, size in cost.peak.items()},
        },
        "forecast_seconds": {**expected, "all": sum(expected.values())},
    }
    tens = ten_billion(given)
    parts: dict[str, Callable[[], Any]] = {
        "correctness": lambda: correctness(torch.device(device)),
        "overlap": lambda: overlap(torch.device(device), tiny=given.tiny),
        "ten_billion": lambda: measured_ten_billion(tens, count=given.steps, machine=given.machine),
        "largest": lambda: largest(given),
    }
    began = time.monotonic()
    for name, part in parts.items():
        left = given.seconds - (time.monotonic() - began)
        if left < expected[name] and not given.tiny:
            result[name] = {"skipped": f"{left:.0f} s left, {expected[name]} s needed"}
        else:
            try:
                result[name] = part()
            except Exception as error:  # the other parts are worth their time
                result[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
        write_result(given.out, result)


if __name__ == "__main__":
    main()
