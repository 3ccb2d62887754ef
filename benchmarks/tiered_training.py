"""Tiered training beside resident training for 50 steps, bit for bit in every cell.

Each cell trains half of the steps in one tier and is resumed into the next tier for the rest;
loss, norm, parameters and states are compared with those of a run that stays on the device. Usage::

    python benchmarks/tiered_training.py [--steps 50]
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from support import write_result

from moesaic.distributed.forked_ranks import run_on_ranks

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from tier_cells import PLANS, RESIDENT, TIERS, Outcome, resume_in, train, trainer_of  # noqa: E402

OUT = ROOT / "benchmarks/results/tiered_training.json"


def compare(plan: str, tiers: list[str], steps: int, folder: str) -> dict[str, list[str]]:
    """Train under each tier, resumed half-way into the next one; return what differs, by tier."""
    resident, half = train(trainer_of(plan, RESIDENT), steps=steps), steps // 2
    different = {}
    for number, tier in enumerate(tiers):
        then = trainer_of(plan, TIERS[tiers[(number + 1) % len(tiers)]])
        resume_in(trainer_of(plan, TIERS[tier]), then, Path(folder) / str(number), step=half)
        resumed = train(then, steps=steps - half)
        last = Outcome(resident.metrics[half + 1 :], resident.tensors)
        first = Outcome(resumed.metrics[1:], resumed.tensors)  # row 1 has the sums of before
        different[tier] = first.differences(last)
    return different


def main() -> None:
    """Run every cell and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    steps = parser.parse_args().steps
    cells: list[dict[str, Any]] = []
    for plan, (ranks, degrees, optimizer) in PLANS.items():
        # ZeRO may not shard experts whose weights are streamed
        streams = ("weights on",) if "expert" in degrees or "zero" not in degrees else ()
        ahead = () if "pipe" in degrees else ("ahead on",)  # a stage's gradients come at the end
        tiers = list(TIERS)[:3] + [
            name for name in TIERS if name.startswith(("late on", *ahead, *streams))
        ]
        tiers = list(TIERS) if ranks == 1 else tiers
        with tempfile.TemporaryDirectory() as folder:
            found = run_on_ranks(ranks, compare, plan, tiers, steps, folder, timeout_s=600.0)
        about = {"plan": plan, "ranks": ranks, "degrees": degrees}
        about["optimizer"] = type(optimizer).__name__
        cells += [about | {"tier": t, "different": [r[t] for r in found]} for t in tiers]
        print(plan, [cell["different"] for cell in cells[-len(tiers) :]], flush=True)
    equal = sum(not any(cell["different"]) for cell in cells)
    write_result(OUT, {"steps": steps, "cells": cells, "equal": equal, "compared": len(cells)})


if __name__ == "__main__":
    main()
