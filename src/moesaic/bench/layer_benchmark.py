"""Layer benchmark: an MoE layer against a dense layer of as many rows and other libraries."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moesaic.bench import implementations
from moesaic.bench.layer_workload import (
    Implementation,
    LayerShape,
    LayerWorkload,
    Passes,
    Skew,
    UnavailableImplementation,
    make_workload,
    saved_bytes,
)
from moesaic.bench.machine_info import git_commit, machine_info
from moesaic.bench.paired_timing import (
    RunTimes,
    fastest,
    measure_in_turns,
    ratio_between,
    ratio_to_baseline,
)
from moesaic.core.errors import UserError, did_you_mean
from moesaic.core.shapes import Tensor

ImplementationFactory = Callable[[LayerWorkload], Implementation | UnavailableImplementation]

DENSE_BASELINES = ("dense", "dense-compiled")
IMPLEMENTATIONS: dict[str, ImplementationFactory] = {
    "dense": implementations.dense,
    "dense-compiled": implementations.dense_compiled,
    "moesaic": implementations.moesaic,
    "moesaic-bfloat16": implementations.moesaic_bfloat16,
    "moesaic-zipf": implementations.moesaic_zipf,
    "unfused-sequential": implementations.unfused("sequential"),
    "unfused-grouped_mm": implementations.unfused("grouped_mm"),
    "hf-grouped_mm": implementations.hugging_face("grouped_mm"),
    "hf-eager": implementations.hugging_face("eager"),
    "deepspeed": implementations.deepspeed,
    "read-weights": implementations.read_weights,
}
ALIASES = {"hf": "hf-grouped_mm", "unfused": "unfused-sequential"}
RENAMED = {"composed": "unfused"}
DECODING_MAX_ROWS = 16  # rows per expert up to which reading weights dominates


@dataclass(frozen=True, slots=True)
class LayerBenchmark:
    """Settings. ``against``: names of ``IMPLEMENTATIONS``; dense and moesaic always run."""

    shape: LayerShape
    passes: Passes = "forward+backward"
    against: Sequence[str] = ("dense-compiled", "unfused", "hf", "deepspeed")
    skew: Skew = "none"
    dtype: torch.dtype = torch.float32
    threads: int = 0
    rounds: int = 9


def run_layer_benchmark(benchmark: LayerBenchmark) -> dict[str, Any]:
    """Measure, and return the result as JSON values."""
    names = implementation_names(benchmark)
    machine = machine_info()  # with the load before the run
    with _torch_threads(benchmark.threads):
        workload = make_workload(benchmark.shape, passes=benchmark.passes, skew=benchmark.skew)
        workload = workload.to(benchmark.dtype)
        built = [IMPLEMENTATIONS[name](workload) for name in names]
        present = {c.name: c for c in built if isinstance(c, Implementation)}
        runs = {name: each.run for name, each in present.items()}
        baseline = fastest(runs, among=[name for name in DENSE_BASELINES if name in present])
        times = measure_in_turns(runs, baseline=baseline, rounds=benchmark.rounds)
        differences = _relative_differences(present)
        saved = {n: saved_bytes(c) for n, c in present.items() if workload.runs_backward}
        threads = torch.get_num_threads()
    rows = {name: _result_row(name, times, baseline=baseline) for name in present}
    for name, row in rows.items():
        row |= {"saved_bytes": saved.get(name), "differs_by": differences.get(name)}
    settings = asdict(benchmark) | {"dtype": str(benchmark.dtype).removeprefix("torch.")}
    return {
        "settings": settings | {"threads": threads, "against": names},
        "dense": baseline,
        "implementations": rows,
        "unavailable": {
            c.name: c.reason for c in built if isinstance(c, UnavailableImplementation)
        },
        "largest_load": _max_load_ratio(workload),
        "least_saved_bytes": 4 * benchmark.shape.min_saved_values
        if workload.runs_backward
        else None,
        "machine": machine,
        "commit": git_commit(),
    }


def implementation_names(benchmark: LayerBenchmark) -> list[str]:
    """Return the implementations to run, in the order of ``IMPLEMENTATIONS``."""
    asked = [ALIASES.get(name, name) for name in benchmark.against]
    for name in asked:
        if (old := name.partition("-")[0]) in RENAMED:
            raise UserError(
                f"the implementation {name} is now called {RENAMED[old]}{name[len(old) :]}"
            )
        if name not in IMPLEMENTATIONS:
            known = [*ALIASES, *IMPLEMENTATIONS]
            raise UserError(
                f'there is no implementation "{name}"{did_you_mean(name, known)} '
                f"(known: {', '.join(known)})"
            )
    asked += ["dense", "moesaic"]
    shape = benchmark.shape
    if benchmark.passes == "forward" and shape.rows <= DECODING_MAX_ROWS * shape.experts:
        asked.append("read-weights")
    return [name for name in IMPLEMENTATIONS if name in asked]


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _result_row(name: str, times: Mapping[str, RunTimes], *, baseline: str) -> dict[str, Any]:
    seconds = sorted(times[name].seconds.values())
    return {
        "median_ms": 1e3 * seconds[len(seconds) // 2],
        "min_ms": 1e3 * seconds[0],
        "runs": len(seconds),
        "of_dense": asdict(ratio_to_baseline(times[name], times[baseline])),
        "of_moesaic": asdict(ratio_between(times[name], times["moesaic"])),
    }


def _relative_differences(present: Mapping[str, Implementation]) -> dict[str, float]:
    """Return the largest difference of each output from ours, over the largest value."""
    with torch.no_grad():
        want = present["moesaic"].forward()
        scale = want.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        found: dict[str, Tensor] = {
            name: c.forward() for name, c in present.items() if c.grad_out.shape == want.shape
        }
    return {
        name: float((out.float() - want.float()).abs().max() / scale)
        for name, out in found.items()
        if out.shape == want.shape
    }


def _max_load_ratio(workload: LayerWorkload) -> float:
    """Return the rows of the most loaded expert over the mean."""
    logits = workload.x.float() @ workload.router_weight.float().t()
    chosen = logits.topk(workload.shape.k).indices.flatten()
    load = torch.bincount(chosen, minlength=workload.shape.experts)
    return float(load.max()) * workload.shape.experts / workload.shape.rows
