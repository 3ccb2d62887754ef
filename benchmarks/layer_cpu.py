"""MoE layer on a CPU against its goals: `moesaic bench layer` for four shapes.

Runs named on the command line are measured again and replace those in the result file, the others
stay. Every run records its machine and commit.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/layer_cpu.py            all of them
    OMP_WAIT_POLICY=PASSIVE python benchmarks/layer_cpu.py A-forward C-forward-1
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import write_result

from moesaic.bench.layer_benchmark import LayerBenchmark, run_layer_benchmark
from moesaic.bench.layer_workload import LAYER_SHAPES

BOTH = "forward+backward"
OTHERS = ("dense-compiled", "unfused", "unfused-grouped_mm", "hf", "deepspeed")
FEW = ("unfused", "hf", "deepspeed")


def benchmarks(*, rounds: int) -> dict[str, LayerBenchmark]:
    made: dict[str, LayerBenchmark] = {}
    for name in "ABD":
        variants = ("moesaic-zipf", "moesaic-bfloat16") if name == "A" else ("moesaic-zipf",)
        for passes in ("forward", BOTH):
            made[f"{name}-{passes}"] = LayerBenchmark(
                LAYER_SHAPES[name],
                passes=passes,
                against=(*OTHERS, *variants),
                threads=2,
                rounds=rounds,
            )
    for passes in ("forward", BOTH):
        for threads in (1, 2):
            made[f"C-{passes}-{threads}"] = LayerBenchmark(
                LAYER_SHAPES["C"],
                passes=passes,
                against=("dense-compiled", "unfused-grouped_mm", "moesaic-bfloat16", *FEW),
                threads=threads,
                rounds=3 * rounds,
            )
    for name in "AB":  # the path without a compiler, on one thread
        made[f"{name}-forward-1"] = LayerBenchmark(
            LAYER_SHAPES[name],
            passes="forward",
            against=("unfused", "hf"),
            threads=1,
            rounds=rounds,
        )
    return made


@dataclass(frozen=True)
class Goal:
    """A bound of a ratio in a run."""

    run: str
    what: str
    read: Callable[[dict[str, Any]], float]
    most: float | None = None
    least: float | None = None

    def judge(self, runs: dict[str, Any]) -> dict[str, Any] | None:
        try:
            value = self.read(runs[self.run]["implementations"])
        except KeyError:  # the run or the implementation is missing
            return None
        met = value <= self.most if self.most is not None else value >= (self.least or 0)
        wanted = f"<= {self.most}" if self.most is not None else f">= {self.least}"
        return {"run": self.run, "what": self.what, "wanted": wanted, "found": value, "met": met}


def of_ours(name: str) -> Callable[[dict[str, Any]], float]:
    return lambda rows: rows[name]["of_moesaic"]["median"]


def of_dense(rows: dict[str, Any]) -> float:
    return rows["moesaic"]["of_dense"]["median"]


def of_reading(rows: dict[str, Any]) -> float:
    return 1 / rows["read-weights"]["of_moesaic"]["median"]


def saved(name: str) -> Callable[[dict[str, Any]], float]:
    return lambda rows: rows["moesaic"]["saved_bytes"] / (4 * LAYER_SHAPES[name].min_saved_values)


def goals() -> list[Goal]:
    found = []
    for name in "ABD":
        for passes in ("forward", BOTH):
            run, forward = f"{name}-{passes}", passes == "forward"
            limit = 1.15 if forward or name == "A" else 1.3
            faster = 2.5 if forward and name == "B" else 1.5
            found += [
                Goal(run, "of dense", of_dense, most=limit),
                Goal(run, "hf grouped_mm of ours", of_ours("hf-grouped_mm"), least=faster),
                Goal(run, "deepspeed of ours", of_ours("deepspeed"), least=2.0),
                Goal(run, "skewed of balanced", of_ours("moesaic-zipf"), most=1.2),
            ]
    for passes in ("forward", BOTH):
        half = of_ours("moesaic-bfloat16")
        found.append(Goal(f"A-{passes}", "bfloat16 weights of float32", half, most=1.25))
    memory = "saved bytes of x and pre-activation"
    found += [Goal(f"{name}-{BOTH}", memory, saved(name), most=1.05) for name in "ABD"]
    run = "C-forward-1"
    found += [
        Goal(run, "of reading the weights", of_reading, most=1.7),
        Goal(run, "hf grouped_mm of ours", of_ours("hf-grouped_mm"), least=1.4),
        Goal(f"C-{BOTH}-1", "hf grouped_mm of ours", of_ours("hf-grouped_mm"), least=1.5),
    ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="*", help="names of runs; all if none is given")
    parser.add_argument("--rounds", type=int, default=7)
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here / "results" / "layer_cpu.json")
    options = parser.parse_args()
    known = benchmarks(rounds=options.rounds)
    runs = json.loads(options.out.read_text())["runs"] if options.out.is_file() else {}
    for name in options.runs or known:
        runs[name] = run_layer_benchmark(known[name])
    result = {
        "question": "an MoE layer against a dense one of as many rows, and against other libraries",
        "goals": [judged for goal in goals() if (judged := goal.judge(runs))],
        "runs": {name: runs[name] for name in known if name in runs},
    }
    write_result(options.out, result)


if __name__ == "__main__":
    main()
