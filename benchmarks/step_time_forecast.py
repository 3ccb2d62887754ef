"""Step times forecast and measured, and the regret of choosing plans by forecast.

The machine is calibrated, every plan of every cell (model x memory limit x micro-batch, on one and
two ranks, with even and skewed routing) is forecast, and the forecasts are written and hashed.
Then every plan runs, in four passes over all; the fastest pass counts, since what else a shared
host does only makes a step longer, for some seconds, and what other processes computed meanwhile is
recorded. Printed: the error of each forecast, and for each cell the time of the plan that the
forecast chose over that of the fastest plan measured.

    python benchmarks/step_time_forecast.py [--quick] [--only forecasts|runs]

Forecasts take a minute on two cores, runs three to four; ``--only runs`` takes the forecasts on
disk. ``step_time_page.py`` then writes the page and the machine file.
"""

import argparse
import contextlib
import hashlib
import json
import os
import resource
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from support import write_result

from moesaic.core.freed_memory import keep_freed_memory
from moesaic.data.batch import Batch
from moesaic.distributed.forked_ranks import RankError, run_cases_on_ranks
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
MACHINE = "cpu-2-cores"
RECEIPTS = OUT.with_name(f"{MACHINE}.receipts.json")
TOKENS, PASSES, MAX_OTHERS = 64, 4, 0.05
WARM_STEPS = {1: 2, 2: 4}  # by ranks: threads that send have memory of their own to fill
MIN_STEPS, MAX_STEPS, SECONDS = {1: 2, 2: 6}, 10, {1: 0.3, 2: 0.7}  # timed in a pass


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


def measure_all(group: Sequence[Case]) -> Iterator[dict[str, Any] | str]:
    """Yield for each case, all on equally many ranks, its steps' seconds, or why it did not run."""
    world = group[0].world
    for found in run_cases_on_ranks(world, _steps, group, timeout_s=120):
        if isinstance(found, RankError):
            yield str(found).strip().splitlines()[-1][:200]
            continue
        # ranks wait for each other: in several steps all take as long, in one the later begins late
        each_rank = zip(*(rank["seconds"] for rank in found), strict=True)
        seconds = [statistics.mean(step) for step in each_rank]
        others = found[0]["busy"] - sum(rank["cpu"] for rank in found)
        yield {
            "median": statistics.median(seconds),
            "seconds": seconds,
            "other_processes": max(0.0, others / (sum(seconds) * cores())),
            "page_faults": max(rank["page_faults"] for rank in found),
        }


def _steps(case: Case) -> dict[str, Any]:
    torch.set_num_threads(1)
    keep_freed_memory()  # as ``train`` does
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
    last = [trainer.train_step() for _ in range(WARM_STEPS[case.world])][-1]
    steps_for = round(SECONDS[case.world] / last.seconds)
    wanted = max(MIN_STEPS[case.world], min(MAX_STEPS, steps_for))
    steps = world.broadcast_object(wanted)
    busy, cpu, found = busy_seconds(), time.process_time(), list[float]()
    faults = page_faults()
    for _ in range(steps):
        started = time.perf_counter()
        trainer.train_step()
        found.append(time.perf_counter() - started)
    return {
        "seconds": found,
        "cpu": time.process_time() - cpu,
        "busy": busy_seconds() - busy,
        "page_faults": (page_faults() - faults) / steps,
    }


def page_faults() -> int:
    """Return the page faults of this process so far: memory that it had given back before."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def busy_seconds() -> float:
    """Return the seconds that all cores have computed since the machine started."""
    user, nice, system, *_ = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def cpu_seconds() -> float:
    """Return the seconds that this process and its children that ended have computed."""
    return sum(os.times()[:4])


def cores() -> int:
    return len(os.sched_getaffinity(0))


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


def write_forecasts(path: Path, *, quick: bool) -> None:
    """Calibrate the machine and write the forecasts of all cases."""
    notify = partial(print, "measured", flush=True)
    busy, cpu = busy_seconds(), cpu_seconds()
    found = calibrate(quick=quick, name=MACHINE, notify=notify)
    others = (busy_seconds() - busy - cpu_seconds() + cpu) / (found.seconds * cores())
    if others > MAX_OTHERS:
        print(f"other processes had {others:.0%} of the cores: the machine looks too slow")
    forecasts = [forecast(case, found.machine) for case in cases(quick=quick)]
    written = {
        "machine": found.machine.to_dict(),
        "product_seconds": product_seconds(),
        "calibration_seconds": found.seconds,
        "calibration_other_processes": max(0.0, others),
        "forecasts": forecasts,
    }
    path.write_text(json.dumps(written, indent=1) + "\n")
    if not quick:
        RECEIPTS.write_text(json.dumps(found.receipts(), indent=1) + "\n")


Passes = dict[Case, list[dict[str, Any] | str]]


def run_passes(*, quick: bool) -> Iterator[Passes]:
    """Run every case, and again; yield after each pass what all have given so far."""
    every = list(cases(quick=quick))
    passes: Passes = {case: [] for case in every}
    for _ in range(1 if quick else PASSES):
        for world in (2, 1):
            group = [case for case in every if case.world == world]
            for case, found in zip(group, measure_all(group), strict=True):
                passes[case].append(found)
        yield passes


def compared(passes: Passes, rows: Sequence[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    """Return the forecasts of cases that ran, with what was measured, and of those that failed."""
    ran, failed = [], []
    for row, found in zip(rows, passes.values(), strict=True):
        done = [each for each in found if isinstance(each, dict)]
        if not done:
            failed.append(row | {"why": found[0]})
            continue
        measured = min(each["median"] for each in done)
        error = row["seconds"] / measured - 1
        ran.append(row | {"measured": measured, "passes": done, "error": error})
    return ran, failed


def summary(rows: list[Any], failed: list[Any]) -> dict[str, Any]:
    """Return errors, misses and regrets."""
    errors = sorted(abs(row["error"]) for row in rows)
    cells = regrets(rows)
    by_ranks = {
        str(n): statistics.median(abs(r["error"]) for r in rows if r["world"] == n) for n in (1, 2)
    }
    return {
        "runs": rows,
        "failed": failed,
        "passes": max(len(row["passes"]) for row in rows),
        "error_median": statistics.median(errors),
        "error_median_by_ranks": by_ranks,
        "error_worst": errors[-1],
        "misses": [r for r in rows if abs(r["error"]) > 0.15],
        "cells": cells,
        "regret_worst": max(cell["regret"] for cell in cells),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=("forecasts", "runs"))
    options = parser.parse_args()
    quick = options.quick
    torch.set_num_threads(1)
    before = FORECASTS.with_suffix(".quick.json") if quick else FORECASTS
    if options.only != "runs":
        write_forecasts(before, quick=quick)
    digest = hashlib.sha256(before.read_bytes()).hexdigest()
    print("forecasts written before any run, sha256", digest, flush=True)
    if options.only == "forecasts":
        return
    written = json.loads(before.read_text())
    out = OUT if not quick else OUT.with_suffix(".quick.json")
    for passes in run_passes(quick=quick):  # each pass is written: a second may be cut short
        found = summary(*compared(passes, written["forecasts"]))
        about = {
            "forecasts_sha256": digest,
            "calibration_seconds": written["calibration_seconds"],
            "slow_down": product_seconds() / written["product_seconds"],
        }
        with contextlib.redirect_stdout(None):
            write_result(out, about | found)
        errors = {key: f"{found[key]:.0%}" for key in ("error_median", "error_worst")}
        print(errors, f"regret {found['regret_worst']:.0%}", flush=True)


if __name__ == "__main__":
    main()
