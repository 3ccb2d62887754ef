"""Sections of layer_gpu.py, and their summary."""

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gpu_checks
import gpu_tuner
import torch
import triton
from gpu_problem import (
    Problem,
    Shape,
    Side,
    interleaved,
    make,
    sides_of,
    spread,
    wait,
)
from triton_interpreter import is_interpreted, patch_interpreter

from moesaic.ops.triton.tiles import Tiles, gpu_architecture, regime, tiles_for

SHAPES = [
    Shape(24576, 1536, 256, 128, 8),
    Shape(24576, 1536, 1024, 32, 2),
    Shape(32768, 4096, 512, 128, 8),
    Shape(32768, 4096, 1024, 64, 4),
]
TUNED_ON = [SHAPES[0], SHAPES[3]]
DECODE = [Shape(t, *sizes) for sizes in ((1536, 256, 128, 8), (4096, 512, 128, 8))
          for t in (1, 4, 16, 64)]  # fmt: skip
GRANULARITY = [Shape(24576, 1536, 1024 // n, 32 * n, 2 * n) for n in (1, 2, 4)]
BITS = Shape(4096, 1536, 256, 64, 8)
WORKERS = 14  # processes that compile
TINY = [Shape(6, 32, 16, 3, 2)]


def has_gpu() -> bool:
    return torch.cuda.is_available()


class Bench:
    """State of the sections: the run, the device, the shapes, and the tuned tiles."""

    def __init__(self, run: Any, *, scattermoe: Path | None) -> None:
        self.run, self.scatter, self.tiny = run, scattermoe, run.dry_run
        self.device = "cpu" if self.tiny else "cuda"
        self.dtype = torch.float32 if self.tiny else torch.bfloat16
        self.card = gpu_architecture(torch.device(self.device))
        self.shapes = TINY if self.tiny else SHAPES
        self.decode_shapes = TINY if self.tiny else DECODE
        self.tuned: dict[str, Tiles] = {}

    def tiles(self, shape: Shape) -> Tiles:
        edges = shape.tokens * shape.k
        return tiles_for(
            edges=edges, experts=shape.experts, dtype=self.dtype, architecture=self.card
        )

    def ours(self, shape: Shape, *, tuned: bool) -> dict[str, Tiles | None]:
        """Our kernel with the tiles of the table and, after tuning, with the tuned ones."""
        name = regime(edges=shape.tokens * shape.k, experts=shape.experts)
        sides: dict[str, Tiles | None] = {"ours": None}
        if tuned and name in self.tuned:
            sides["ours_tuned"] = self.tuned[name]
        return sides

    def sides(self, p: Problem, *, tuned: bool) -> list[Side]:
        ours = self.ours(p.shape, tuned=tuned)
        return sides_of(p, ours=ours, scatter=self.scatter, say=self.run.say)

    def problem(self, shape: Shape) -> Problem:
        return make(shape, device=self.device, dtype=self.dtype)

    def compile(self) -> Any:
        """Compile everything in parallel processes; later sections use the cache on disk."""
        if self.tiny:
            return {"skipped": "nothing is compiled in the interpreter"}
        many, few = self.tiles(SHAPES[0]), self.tiles(DECODE[0])
        jobs = [(self.tiles(s), s, self.dtype, True) for s in SHAPES]
        jobs += [(self.tiles(s), s, self.dtype, True) for s in (gpu_checks.STEP, BITS)]
        jobs += [(self.tiles(s), s, self.dtype, True) for s in GRANULARITY]
        jobs += [(self.tiles(s), s, self.dtype, False) for s in DECODE]
        for shape in TUNED_ON:
            for tiles in gpu_tuner.bundles(gpu_tuner.MANY, base=many):
                jobs.append((tiles, shape, self.dtype, True))
        for tiles in gpu_tuner.bundles(gpu_tuner.FEW, base=few):
            jobs.append((tiles, DECODE[3], self.dtype, False))
        most = min(120.0, self.run.seconds / 4)
        end = self.run.left - most
        return gpu_tuner.compile_all(jobs, workers=WORKERS, left=lambda: self.run.left - end)

    def table(self, *, tuned: bool) -> Any:
        rows = []
        for shape in self.shapes:
            if self.run.left < 15 and not self.tiny:
                rows.append({"shape": str(shape), "skipped": "no time left"})
                continue
            rows.append(self._row(shape, tuned=tuned))
            _forget()
        return rows

    def _row(self, shape: Shape, *, tuned: bool) -> dict[str, Any]:
        p = self.problem(shape)
        sides = self.sides(p, tuned=tuned)
        row: dict[str, Any] = {"shape": str(shape), "agree": _agree(sides)}
        for what, flops in (("forward", shape.flops), ("both", 3 * shape.flops)):
            works = {side.name: partial(_call, side, what) for side in sides}
            times = interleaved(works, rounds=7, repeats=3, left=lambda: self.run.left - 10)
            row[what] = _compare(times, flops=flops, tiny=self.tiny)
        row["memory"] = {side.name: self._memory(side, p) for side in sides if side.leaves}
        self.run.say(f"{shape}: {_short(row)}")
        return row

    def _memory(self, side: Side, p: Problem) -> dict[str, Any]:
        """Bytes beyond inputs and weights: saved after forward, and peak."""
        if self.tiny:
            return {"skipped": "no allocator to ask"}
        weights = sum(t.numel() * t.element_size() for t in (p.up, p.down))
        try:
            _forget()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            out = side.forward()
            wait()
            kept = torch.cuda.memory_allocated() - before - out.numel() * out.element_size()
            peak_forward = torch.cuda.max_memory_allocated() - before
            grads = torch.autograd.grad(out, side.leaves, p.back)
            wait()
            peak = torch.cuda.max_memory_allocated() - before
            del grads, out
        except torch.OutOfMemoryError as error:
            return {"error": str(error)[:200]}
        found = {"kept": kept, "peak_forward": peak_forward, "peak": peak}
        found["peak_without_weight_gradients"] = max(peak_forward, peak - weights)
        return {name: round(value / 2**20, 1) for name, value in found.items()} | {"unit": "MiB"}

    def memory(self) -> Any:
        """Saved bytes with finer experts at constant FLOPs: (n, K) -> (n / 2, 2 K)."""
        rows = []
        for shape in TINY if self.tiny else GRANULARITY:
            p = self.problem(shape)
            sides = [side for side in self.sides(p, tuned=False) if side.leaves]
            _warm(sides)
            held = {side.name: self._memory(side, p) for side in sides}
            rows.append({"shape": str(shape), "memory": held})
            self.run.say(f"{shape}: {held}")
            del p, sides
            _forget()
        return rows

    def decode(self, *, tuned: bool) -> Any:
        """Few tokens, no gradients: eager calls, and ours and grouped_mm from a CUDA graph."""
        rows = []
        for shape in self.decode_shapes:
            p = self.problem(shape)
            sides = [side for side in self.sides(p, tuned=tuned) if side.name != "cublas"]
            with torch.no_grad():
                works: dict[str, Callable[[], Any]] = {s.name: s.forward for s in sides}
                if not self.tiny:
                    works |= _graphs(works, say=self.run.say)
                times = interleaved(works, rounds=7, repeats=20, left=lambda: self.run.left)
            active = len(p.expert.unique())
            read = active * 3 * shape.dim * shape.hidden * p.x.element_size()
            row = {"shape": str(shape), "active_experts": active, "bytes_of_their_weights": read}
            row["sides"] = _compare(times, flops=shape.flops, tiny=self.tiny)
            for found in row["sides"].values():
                if found.get("median_ms"):
                    found["weights_gb_per_s"] = read / found["median_ms"] / 1e6
            rows.append(row)
            self.run.say(f"{shape}: {_medians(row['sides'])}")
            _forget()
        return rows

    def tune(self) -> Any:
        found: dict[str, Any] = {}
        many, few = (gpu_tuner.TINY, {}) if self.tiny else (gpu_tuner.MANY, gpu_tuner.FEW)
        self._tune("many", many, on=TINY if self.tiny else TUNED_ON, found=found)
        if few:
            self._tune("few", few, on=[DECODE[3]], found=found)
        kind = "single" if self.tiny else "half"
        path = self.run.out / "tuned.json"
        gpu_tuner.write_table(path, card=self.card, kind=kind, tuned=self.tuned)
        return found

    def _tune(self, name: str, candidates: Any, *, on: list[Shape], found: dict[str, Any]) -> None:
        timed, base = [], self.tiles(on[0])
        for shape in on:
            p = self.problem(shape)
            # a minute is left to what comes after
            found_here = gpu_tuner.time_candidates(
                p, candidates, base=base, left=lambda: self.run.left - 60
            )
            timed.append(found_here)
            _forget()
        self.tuned[name] = gpu_tuner.best(timed, base=base)
        chosen = {op: gpu_tuner.to_numbers(tile) for op, tile in self.tuned[name].items()}
        found[name] = {"chosen": chosen}
        if not self.tiny:
            found[name]["timed"] = [
                {"shape": str(s), "products": t} for s, t in zip(on, timed, strict=True)
            ]
        self.run.say(f"tuned {name}: {chosen}")


def prepare(run: Any, *, scattermoe: Path | None) -> dict[str, Callable[[], Any]]:
    """Return the function of each section by name, and record the environment."""
    if is_interpreted():
        patch_interpreter()
    bench = Bench(run, scattermoe=scattermoe)
    device, tiny = bench.device, bench.tiny
    name = "interpreter" if tiny else torch.cuda.get_device_name()
    run.found["versions"] = {"torch": torch.__version__, "triton": triton.__version__}
    run.found["card"] = name
    run.say(f"{name}, torch {torch.__version__}, triton {triton.__version__}")
    small = TINY[0] if tiny else BITS
    workers = 0 if tiny else WORKERS
    gpu_only = {"skipped": "for a GPU alone"}
    return {
        "compile": bench.compile,
        "kernels": lambda: gpu_checks.verdict(
            gpu_checks.kernel_tasks(device=device, tiny=tiny), workers=workers, seconds=90
        ),
        "moe_kernel": lambda: gpu_checks.verdict(
            gpu_checks.moe_kernel_tasks(device=device, tiny=tiny), workers=workers, seconds=60
        ),
        "no_wait": lambda: gpu_only if tiny else gpu_checks.no_wait(device=device),
        "graph": lambda: gpu_only if tiny else gpu_checks.graph(device=device),
        "same_bits": lambda: gpu_checks.same_bits(device=device, dtype=bench.dtype, shape=small),
        "table": lambda: bench.table(tuned=False),
        "decode": lambda: bench.decode(tuned=False),
        "memory": bench.memory,
        "tune": bench.tune,
        "table_tuned": lambda: bench.table(tuned=True),
        "decode_tuned": lambda: bench.decode(tuned=True),
    }


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Whether every check that ran passed, and the ratios of the goals."""
    checks = ("kernels", "moe_kernel", "no_wait", "graph", "same_bits")
    ran = {name: found[name] for name in checks if name in found and "skipped" not in found[name]}
    right = all(result.get("right", False) for result in ran.values())
    verdict: dict[str, Any] = {
        "right": right,
        "checks": {n: r.get("right") for n, r in ran.items()},
    }
    for name in ("table", "table_tuned"):
        rows = found.get(name, [])
        lines = [
            {"shape": row["shape"], "both": row["both"], "agree": row["agree"]}
            for row in (rows if isinstance(rows, list) else [])
            if "both" in row
        ]
        verdict[name] = lines
    return verdict


def _compare(times: dict[str, list[float]], *, flops: int, tiny: bool) -> dict[str, Any]:
    """Medians, rates, share of cuBLAS, and paired ratios to the others. None in a dry run."""
    found: dict[str, Any] = {}
    for name, one in times.items():
        if tiny or not one:
            found[name] = {} if one else {"failed": True}
            continue
        found[name] = spread(one)
        found[name]["tflop_per_s"] = flops / found[name]["median_ms"] / 1e9
    for name in [n for n in found if n.startswith("ours") and not tiny and times[n]]:
        for other, theirs in times.items():
            if theirs and other != name:
                pairs = [b / a for a, b in zip(times[name], theirs, strict=False)]
                found[name][f"times_faster_than_{other}"] = statistics.median(pairs)
    return found


def _call(side: Side, what: str) -> Any:
    return side.forward() if what == "forward" else side.both()


def _agree(sides: list[Side]) -> dict[str, Any]:
    """Difference of each output from that of grouped_mm: all have the same inputs."""
    with torch.no_grad():
        outs = {}
        for side in sides:
            try:
                if side.leaves:
                    outs[side.name] = side.forward().float()
            except Exception as error:
                outs[side.name] = f"{type(error).__name__}: {str(error)[:200]}"
    reference = outs.get("grouped_mm")
    if not isinstance(reference, torch.Tensor):
        return {"error": f"no reference: {reference}"}
    return {
        name: out if isinstance(out, str) else gpu_checks.off(out, reference)
        for name, out in outs.items()
    }


def _graphs(works: dict[str, Callable[[], Any]], *, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the replays of the functions that can be captured."""
    found = {}
    for name, work in works.items():
        try:
            for _ in range(3):
                work()
            wait()
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                work()
            found[f"{name} (graph)"] = captured.replay
        except Exception as error:
            say(f"{name} cannot be captured: {type(error).__name__}: {str(error)[:100]}")
    return found


def _warm(sides: list[Side]) -> None:
    for side in sides:
        try:
            side.both()
        except Exception:  # told where it is measured
            continue


def _medians(found: dict[str, Any]) -> dict[str, float]:
    return {n: round(f["median_ms"], 4) for n, f in found.items() if f.get("median_ms")}


def _short(row: dict[str, Any]) -> dict[str, Any]:
    return {what: _medians(row[what]) for what in ("forward", "both")}


def _forget() -> None:
    if not is_interpreted():
        torch.cuda.empty_cache()
