"""Step times forecast and measured, and the regret of choosing plans by forecast.

The machine is calibrated, every plan of every cell (model x memory limit x micro-batch, on one and
two ranks, with even and skewed routing) is forecast, and the forecasts are written and hashed.
Then every plan runs. Printed: the error of each forecast, and for each cell the time of the plan
that the forecast chose over that of the fastest plan measured.

    python benchmarks/step_time_forecast.py [--quick]
"""

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support import write_result

from moesaic.data.batch import Batch
from moesaic.distributed.forked_ranks import RankError, run_on_ranks
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.parameter_flop_count import BatchDims
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.parallel.activation_checkpointing import CheckpointBlocks
from moesaic.parallel.config import ParallelConfig
from moesaic.planner.calibrate import calibrate
from moesaic.planner.cost_entries import DEVICE
from moesaic.planner.cost_settings import CostSettings
from moesaic.planner.dry_run import dummy_batch, with_round_robin_routing
from moesaic.planner.machine import Machine
from moesaic.planner.measured_rates import Stopwatch, dense_product
from moesaic.planner.step_cost import step_cost
from moesaic.planner.step_time import step_time
from moesaic.testing.tiny_models import TinyStream, tiny_run
from moesaic.train.run_training import seeded_trainer

OUT = Path(__file__).parent / "results" / "step_time_forecast.json"
FORECASTS = Path(__file__).parent / "results" / "step_time_forecasts_before.json"
TOKENS, WARM_STEPS = 64, 2


def model(dim: int, *, layers: int, experts: int, k: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=512,
        dim=dim,
        encoder=Stack(layers=0),
        decoder=Stack(layers=layers, moe_every=1),
        attention=AttentionConfig(heads=4),
        feed_forward=FeedForwardConfig(hidden=2 * dim),
        moe=MoE(experts=experts, select=TopK(k=k)),
    )


MODELS = {
    "d128 e8 k2": (model(128, layers=2, experts=8, k=2), None),
    "d256 e4 k1": (model(256, layers=2, experts=4, k=1), None),
    "d128 e8 k2 skewed": (model(128, layers=2, experts=8, k=2), 0.45),
}
ROWS = (16, 48)


def plans(world: int) -> dict[str, tuple[ParallelConfig, int]]:
    """Return the plans of a cell: parallel config and micro-batches."""
    again = CheckpointBlocks()
    one = ParallelConfig()
    if world == 1:
        return {
            "one batch": (one, 1),
            "two micro-batches": (one, 2),
            "four micro-batches": (one, 4),
            "checkpointing": (one.replace(activation_checkpointing=again), 1),
            "checkpointing, two micro-batches": (one.replace(activation_checkpointing=again), 2),
        }

    def plan(**degrees: Any) -> ParallelConfig:
        return one.replace(plan=ParallelPlan(**degrees))

    return {
        "data 2": (plan(data=2), 1),
        "data 2, two micro-batches": (plan(data=2), 2),
        "data 2, zero 3": (plan(data=2, zero=3), 1),
        "expert 2": (plan(data=2, expert=2), 1),
        "expert 2, checkpointing": (
            plan(data=2, expert=2).replace(activation_checkpointing=again),
            1,
        ),
        "tensor 2": (plan(tensor=2), 1),
    }


@dataclass(frozen=True, slots=True)
class Case:
    """A plan of a model on ``world`` ranks for ``rows`` rows a step."""

    model: str
    world: int
    rows: int
    plan: str

    @property
    def settings(self) -> CostSettings:
        config, share = MODELS[self.model]
        parallel, micro_batches = plans(self.world)[self.plan]
        data = parallel.plan.resolve(self.world).data or 1
        sizes = BatchDims(rows=self.rows // micro_batches // data, source=0, target=TOKENS)
        return CostSettings(
            model=config,
            parallel=parallel,
            sizes=sizes,
            micro_batches=micro_batches,
            world=self.world,
            busiest_share=share,
            device="cpu",
        )


def cases(*, quick: bool = False) -> Iterator[Case]:
    for name in list(MODELS)[:: 2 if quick else 1]:
        for world in (1, 2):
            for rows in ROWS[:1] if quick else ROWS:
                yield from (Case(name, world, rows, plan) for plan in plans(world))


def forecast(case: Case, machine: Machine) -> dict[str, Any]:
    """Return the forecast of a case: seconds, their parts, and peak bytes of rank 0."""
    settings = case.settings
    cost = step_cost(settings)
    moe = settings.model.moe
    found = step_time(
        cost,
        machine=machine,
        plan=settings.parallel.plan.resolve(case.world),
        num_experts=moe.experts if isinstance(moe, MoE) else 1,
    )
    return {
        "model": case.model,
        "world": case.world,
        "rows": case.rows,
        "plan": case.plan,
        "seconds": found.total,
        "compute": dict(found.compute),
        "communication": dict(found.communication),
        "update": found.update,
        "peak_bytes": cost.peak[DEVICE],
    }


class FullRows(TinyStream):
    """The same full batch, over and over."""

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        self._batch = batch

    def __next__(self) -> Batch:
        return self._batch


def measure(case: Case, *, steps: int) -> list[float] | str:
    """Return the seconds of each step, of the slowest rank, or why the case did not run."""
    try:
        per_rank = run_on_ranks(case.world, _steps, case, steps, timeout_s=120)
    except RankError as error:
        return str(error).strip().splitlines()[-1][:200]
    return [max(each) for each in zip(*per_rank, strict=True)]


def _steps(case: Case, steps: int) -> list[float]:
    torch.set_num_threads(1)
    settings = case.settings
    config = with_round_robin_routing(settings.model, busiest_share=settings.busiest_share)
    run = tiny_run(
        model=config,
        parallel=settings.parallel,
        steps=10_000,
        gradient_accumulation_steps=settings.micro_batches,
    )
    world = SingleProcess() if case.world == 1 else ProcessGroupWorld()
    batch = dummy_batch(config, settings.sizes)
    trainer = seeded_trainer(run, make_loader=lambda _: FullRows(batch), world=world)
    found = []
    for _ in range(WARM_STEPS + steps):
        started = time.perf_counter()
        trainer.train_step()
        found.append(time.perf_counter() - started)
    return found[WARM_STEPS:]


def product_seconds() -> float:
    """Return the time of a product: its change is that of the machine, not of a forecast."""
    watch = Stopwatch(torch.device("cpu"), 0.25)
    return dense_product(watch, rows=512, dim=512, dtype=torch.float32).median


def regrets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each cell the plan that the forecast chose, the fastest, and the regret."""
    found = []
    for name, world, batch in sorted({(r["model"], r["world"], r["rows"]) for r in rows}):
        group = [r for r in rows if (r["model"], r["world"], r["rows"]) == (name, world, batch)]
        peaks = sorted(r["peak_bytes"] for r in group)
        for limit in ("none", peaks[len(peaks) // 2]):
            fits = [r for r in group if limit == "none" or r["peak_bytes"] <= limit]
            chosen = min(fits, key=lambda r: r["seconds"])
            fastest = min(fits, key=lambda r: r["measured"])
            found.append(
                {
                    "model": name,
                    "world": world,
                    "rows": batch,
                    "limit": limit,
                    "chosen": chosen["plan"],
                    "fastest": fastest["plan"],
                    "plans": len(fits),
                    "regret": chosen["measured"] / fastest["measured"] - 1,
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    found = calibrate(quick=quick, notify=lambda what: print("measured", what, flush=True))
    speed = product_seconds()
    forecasts = [forecast(case, found.machine) for case in cases(quick=quick)]
    text = json.dumps({"machine": found.machine.to_dict(), "forecasts": forecasts}, indent=1)
    before = FORECASTS.with_suffix(".quick.json") if quick else FORECASTS
    before.write_text(text + "\n")
    digest = hashlib.sha256(before.read_bytes()).hexdigest()
    print("forecasts written before any run, sha256", digest, flush=True)
    rows, failed = [], []
    for case, row in zip(cases(quick=quick), forecasts, strict=True):
        seconds = measure(case, steps=5)
        if isinstance(seconds, str):
            failed.append(row | {"why": seconds})
            continue
        measured = statistics.median(seconds)
        error = row["seconds"] / measured - 1
        rows.append(row | {"measured": measured, "spread": seconds, "error": error})
        print(f"{case.model}, {case.world} ranks, {case.rows} rows, {case.plan}: {error:+.0%}")
    errors = sorted(abs(row["error"]) for row in rows)
    cells = regrets(rows)
    result = {
        "forecasts_sha256": digest,
        "runs": rows,
        "failed": failed,
        "slow_down": product_seconds() / speed,
        "error_median": statistics.median(errors),
        "error_worst": errors[-1],
        "misses": [r for r in rows if abs(r["error"]) > 0.15],
        "cells": cells,
        "regret_worst": max(cell["regret"] for cell in cells),
    }
    write_result(OUT if not quick else OUT.with_suffix(".quick.json"), result)


if __name__ == "__main__":
    main()
