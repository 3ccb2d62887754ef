"""Training steps on a processor with freed memory kept and given back: page faults and seconds.

Plans of ``step_time_forecast.py`` on one rank, each a process of its own. Both kinds take turns,
and the fastest of some rounds counts.

    python benchmarks/freed_memory.py [--rounds 3]
"""

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from step_time_forecast import Case, FullRows, page_faults, plans
from support import write_result

from moesaic.core.freed_memory import keep_freed_memory
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.world import SingleProcess
from moesaic.planner.dry_run import dummy_batch, with_round_robin_routing
from moesaic.testing.tiny_models import tiny_run
from moesaic.train.run_training import seeded_trainer

OUT = Path(__file__).parent / "results" / "freed_memory.json"
MODELS, ROWS = ("d128 e8 k2", "d256 e4 k1"), 16
WARM_STEPS, STEPS = 3, 5
MANY_FAULTS = 500  # a step: 2 MB


@dataclass(frozen=True, slots=True)
class Steps:
    """A case's steps in a new process."""

    case: Case
    keeps: bool

    def measure(self) -> dict[str, float]:
        """Return page faults and the median of processor and wall seconds of a step."""
        (found,) = run_on_ranks(1, self._run, timeout_s=120)
        return found

    def _run(self) -> dict[str, float]:
        torch.set_num_threads(1)
        if self.keeps:
            keep_freed_memory()
        settings = self.case.settings
        config = with_round_robin_routing(settings.model)
        run = tiny_run(
            model=config,
            parallel=settings.parallel,
            steps=10_000,
            gradient_accumulation_steps=settings.micro_batches,
        )
        batch = dummy_batch(config, settings.sizes)
        trainer = seeded_trainer(run, make_loader=lambda _: FullRows(batch), world=SingleProcess())
        for _ in range(WARM_STEPS):
            trainer.train_step()
        faults, cpu, wall = page_faults(), list[float](), list[float]()
        for _ in range(STEPS):
            started, computed = time.perf_counter(), time.process_time()
            trainer.train_step()
            wall.append(time.perf_counter() - started)
            cpu.append(time.process_time() - computed)
        return {
            "page_faults": (page_faults() - faults) / STEPS,
            "cpu": statistics.median(cpu),
            "seconds": statistics.median(wall),
        }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how many plans have many page faults, and what steps take over kept memory."""
    ratios = {
        row["case"]: min(each["cpu"] for each in row["given back"])
        / min(each["cpu"] for each in row["kept"])
        for row in rows
    }
    faults = {
        kind: [statistics.median(each["page_faults"] for each in row[kind]) for row in rows]
        for kind in ("kept", "given back")
    }
    return {
        "plans": len(rows),
        "plans_with_many_faults": {k: sum(f > MANY_FAULTS for f in v) for k, v in faults.items()},
        "many_faults": MANY_FAULTS,
        "most_faults": {kind: max(found) for kind, found in faults.items()},
        "cpu_over_kept": ratios,
        "cpu_over_kept_median": statistics.median(ratios.values()),
        "cpu_over_kept_worst": max(ratios.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    cases = [Case(model, 1, ROWS, plan) for model in MODELS for plan in plans(1)]
    kinds = {"kept": True, "given back": False}
    rows: list[dict[str, Any]] = [
        {"case": f"{case.model}, {case.rows} rows, {case.plan}", "kept": [], "given back": []}
        for case in cases
    ]
    for _ in range(given.rounds):
        for case, row in zip(cases, rows, strict=True):
            for kind, keeps in kinds.items():
                row[kind].append(Steps(case, keeps=keeps).measure())
    write_result(OUT, summary(rows) | {"rows": rows})


if __name__ == "__main__":
    main()
