"""Hundreds of random models, batches and plans, each against one process.

    python benchmarks/fuzz_plans.py --cases 300

Drawn at random (``random_cases.py``) are rules of routing, heads, experts, biases, lengths, rows
(so that some ranks have no token), ranks and the plan. Two steps each, with AdamW or Muon.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from random_cases import RandomCase, random_cases
from support import write_result

from moesaic.verify.compare_plans import (
    PlanResult,
    compare_plans,
    make_setup,
    run_reference,
)
from moesaic.verify.trace_differences import TraceDifferences

PARTS = (
    "select",
    "limit",
    "noise",
    "expert",
    "shared_experts",
    "null_experts",
    "dispatch_projection",
    "router_input",
    "cross_layer",
)


def run_case(case: RandomCase) -> PlanResult:
    setup = replace(make_setup(case.run, steps=2, timeout_s=90.0), shape=case.shape)
    [result] = compare_plans(setup, plans=[case.parallel], reference=run_reference(setup))
    return result


def worst(results: Iterable[PlanResult]) -> dict[str, Any]:
    found = [result.differences for result in results if result.differences]
    names = [field.name for field in fields(TraceDifferences)]
    return {n: asdict(max((getattr(f, n) for f in found), key=lambda w: w.value)) for n in names}


def drawn(tried: Iterable[RandomCase]) -> dict[str, int]:
    """Count the members that were tried, by name."""
    counts: Counter[str] = Counter()
    for case in tried:
        counts[f"ranks {case.world_size}"] += 1
        counts[type(case.run.optimizer).__name__] += 1
        moe = case.run.model.moe.to_dict()
        counts.update(moe[part]["kind"] for part in PARTS)
        counts.update(term["kind"] for term in moe["balance"])
        plan = case.parallel.plan.to_dict()
        counts.update(
            n for n, v in plan.items() if not isinstance(v, bool) and (v or 0) > (n != "zero")
        )
        counts.update(
            v["kind"]
            for n, v in case.parallel.to_dict().items()
            if n in ("context_parallel", "dispatch")
        )
    return dict(sorted(counts.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=4, help="ranks")
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here / "results" / "fuzz_plans.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tried: list[RandomCase] = []
    results: list[PlanResult] = []
    bad: list[dict[str, Any]] = []
    start = time.monotonic()
    for case in islice(random_cases(options.seed, max_ranks=options.most), options.cases):
        result = run_case(case)
        tried.append(case)
        results.append(result)
        if not result.equal:
            bad.append({"number": len(tried) - 1, "wrong": result.problems, **case.summary})
        state = "equal" if result.equal else "; ".join(result.problems)
        print(f"{len(tried)} {case.world_size} ranks, {result.plan}: {state}", flush=True)
    summary = {
        "question": "does a random model train equally under a random plan and in one process?",
        "cases": len(tried),
        "seed": options.seed,
        "not equal": bad,
        "worst": worst(results),
        "drawn": drawn(tried),
        "seconds": round(time.monotonic() - start),
    }
    write_result(options.out, summary)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
