"""AdamW on a CPU: our compiled kernel beside torch's optimizers and DeepSpeed's CPUAdam.

    python benchmarks/cpu_optimizer.py --out benchmarks/results/cpu_optimizer.json

Each optimizer has its own copy of the parameters and the same gradients, and takes one step per
turn (``bench/paired_timing.py``). DeepSpeed is measured where it is installed. ``COPY`` is the
memory's own time: a copy that reads and writes as many bytes as an update in float32.
"""

import argparse
import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from support import write_result

from moesaic.bench.paired_timing import measure_in_turns, ratio_to_baseline
from moesaic.memory.tier import MAX_IN_FLIGHT_BYTES, HostMemory
from moesaic.ops import kernel_selection
from moesaic.ops.adamw import AdamWSettings, AdamWTensor, adamw_by_operations
from moesaic.ops.cpu.cpu_adamw import AdamWStatus, load_adamw
from moesaic.optim.named_optimizer import NamedOptimizer
from moesaic.optim.optimizer import AdamW
from moesaic.optim.tiered_states import TieredStates

SHAPES: Mapping[str, list[tuple[int, ...]]] = {
    "4 large": [(8, 512, 512)] * 4,
    "100 small": [(64, 96), (96,)] * 50,
}
SETTINGS = AdamWSettings(lr=1e-3, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01)
BASELINE = "torch, one tensor at a time"
COPY = "a copy of as many bytes"
UPDATE_BYTES = 28  # parameter and two means read and written, gradient read


def parameters(shapes: list[tuple[int, ...]], *, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Return parameters with gradients, the same ones at every call."""
    make = torch.Generator().manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(s, generator=make).to(dtype)) for s in shapes]
    for one in made:
        one.grad = torch.randn(one.shape, generator=make).to(dtype)
    return made


def torch_step(shapes: list[tuple[int, ...]], **options: Any) -> Callable[[], object]:
    """Return a step of torch.optim.AdamW."""
    made = parameters(shapes, dtype=torch.float32)
    return torch.optim.AdamW(made, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, **options).step


def our_optimizer(shapes: list[tuple[int, ...]], *, dtype: torch.dtype) -> NamedOptimizer:
    """Return moesaic's AdamW with the compiled kernel."""
    named = {str(i): p for i, p in enumerate(parameters(shapes, dtype=dtype))}
    kinds = dict.fromkeys(named, "matrix")
    return AdamW(lr=1e-3, weight_decay=0.01).build(named.items(), kinds=kinds)


def tiered_step(shapes: list[tuple[int, ...]]) -> Callable[[], object]:
    """Return a step of moesaic's AdamW with its states on the host tier."""
    optimizer = our_optimizer(shapes, dtype=torch.float32)
    store = HostMemory().open(device=torch.device("cpu"), label="states")
    optimizer.tier = TieredStates(store, MAX_IN_FLIGHT_BYTES)
    return optimizer.step


def kernel_step(
    shapes: list[tuple[int, ...]], *, kernel: Callable[..., None]
) -> Callable[[], None]:
    """Return an update by a kernel alone: float32 master, bfloat16 gradient and parameter."""
    made = parameters(shapes, dtype=torch.bfloat16)
    tensors = [
        AdamWTensor(
            p.detach().float(),
            p.grad,
            torch.zeros(p.shape),
            torch.zeros(p.shape),
            SETTINGS.factors(1),
            p.detach(),
        )
        for p in made
        if p.grad is not None
    ]
    return lambda: kernel(tensors)


def deepspeed_step(shapes: list[tuple[int, ...]], *, dtype: torch.dtype) -> Callable[[], object]:
    """Return a step of DeepSpeed's CPUAdam (AdamW mode)."""
    adam = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
    made = parameters(shapes, dtype=dtype)
    return adam(made, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, adamw_mode=True).step


def implementations(shapes: list[tuple[int, ...]]) -> dict[str, Callable[[], object]]:
    """Return a step of every implementation that is installed."""
    compiled = load_adamw().kernel
    if compiled is None:
        raise SystemExit(load_adamw().reason)
    half = UPDATE_BYTES // 2 * sum(map(math.prod, shapes))
    source, target = torch.ones(half, dtype=torch.uint8), torch.zeros(half, dtype=torch.uint8)
    found = {
        COPY: lambda: target.copy_(source),
        BASELINE: torch_step(shapes, foreach=False),
        "torch foreach": torch_step(shapes, foreach=True),
        "torch fused": torch_step(shapes, fused=True),
        "ours": our_optimizer(shapes, dtype=torch.float32).step,
        "ours, states on the host tier": tiered_step(shapes),
        "ours, separate operations": our_separate(shapes),
        "ours, bfloat16 with master": our_optimizer(shapes, dtype=torch.bfloat16).step,
        "ours, kernel alone, bfloat16": kernel_step(shapes, kernel=compiled),
    }
    if importlib.util.find_spec("deepspeed"):
        found["DeepSpeed CPUAdam"] = deepspeed_step(shapes, dtype=torch.float32)
        found["DeepSpeed CPUAdam, bfloat16"] = deepspeed_step(shapes, dtype=torch.bfloat16)
    return found


def our_separate(shapes: list[tuple[int, ...]]) -> Callable[[], object]:
    """Return a step of moesaic's AdamW without the compiled kernel."""
    step, status = our_optimizer(shapes, dtype=torch.float32).step, AdamWStatus(None, "not used")

    def run() -> None:
        before, kernel_selection.load_adamw = kernel_selection.load_adamw, lambda: status
        try:
            step()
        finally:
            kernel_selection.load_adamw = before

    return run


def measure(shapes: list[tuple[int, ...]], *, rounds: int) -> dict[str, Any]:
    """Return milliseconds and ratios to the baseline of every implementation."""
    steps = implementations(shapes)
    for step in steps.values():
        step()
        step()
    times = measure_in_turns(steps, baseline=BASELINE, rounds=rounds)
    summary = {name: ratio_to_baseline(each, times[BASELINE]) for name, each in times.items()}
    return {
        name: {
            "best_ms": round(1e3 * min(times[name].seconds.values()), 3),
            "ratio": round(found.median, 3),
            "quartiles": [round(q, 3) for q in found.quartiles],
            "best_ratio": round(found.best_over_best, 3),
        }
        for name, found in summary.items()
    }


def largest_difference(*, steps: int = 100) -> float:
    """Return the largest difference of a parameter from torch's fused AdamW after some steps."""
    ours, theirs = (parameters([(40_001,)], dtype=torch.float32) for _ in range(2))
    rule = torch.optim.AdamW(theirs, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    first, second = torch.zeros(40_001), torch.zeros(40_001)
    for step in range(1, steps + 1):
        grad = torch.randn(40_001, generator=torch.Generator().manual_seed(step))
        ours[0].grad = theirs[0].grad = grad
        adamw_by_operations(
            [AdamWTensor(ours[0].data, grad, first, second, SETTINGS.factors(step))]
        )
        rule.step()
    return float((ours[0].detach() - theirs[0].detach()).abs().max())


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu_optimizer.json"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--note", default="")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    result = {
        "baseline": BASELINE,
        "threads": given.threads,
        "note": given.note,
        "largest_difference_from_torch_fused_after_100_steps": largest_difference(),
        "cases": {name: measure(s, rounds=given.rounds) for name, s in SHAPES.items()},
    }
    write_result(given.out, result)


if __name__ == "__main__":
    main()
