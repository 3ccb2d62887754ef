"""The number of chunks by cost model and by simulated schedule, and the fit of the costs.

Random layers: the start and total time of all_counts stage is drawn log-uniformly (a start of 1 to
100 % of a second, a total of 0.3 to 10 seconds), half of them with other traffic between nodes. For
each, the choice by formula is compared with all_counts number of chunks in the simulated schedule.
The measured part times gloo's all-to-all over local ranks and the experts of one layer (the least
of several repetitions) and fits a linear cost to each: the input of ``best_num_chunks`` on a
cluster.

    python benchmarks/overlap.py
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from chunk_schedule import (
    CHUNK_CANDIDATES,
    NO_COST,
    LayerCost,
    StageCost,
    best_num_chunks,
    fit_cost,
    simulated_seconds,
)
from support import write_result

from moesaic.distributed.collectives import all_to_all
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.moe.adaptive_dispatcher import LinearCost
from moesaic.moe.chunked_dispatcher import OverlapDegrees
from moesaic.moe.experts import ExpertShape, GroupedExperts
from moesaic.nn.feed_forward import FeedForwardConfig, SwiGLU
from moesaic.ops.permute import group_by_expert

DIM, HIDDEN, EXPERTS, RANKS = 256, 256, 4, 2
ROWS = (1024, 2048, 4096, 8192, 16384)


def stage(draw: random.Random) -> StageCost:
    return StageCost(LinearCost(10 ** draw.uniform(-2, 0), 10 ** draw.uniform(-0.5, 1)), 1.0)


def random_layers(count: int, *, sliced: bool) -> list[LayerCost]:
    draw = random.Random(0)
    return [
        LayerCost(
            all_to_all=stage(draw),
            experts=stage(draw),
            all_gather=stage(draw) if sliced else NO_COST,
            reduce_scatter=stage(draw) if sliced else NO_COST,
            gradient_s=draw.choice([0.0, draw.uniform(0, 20)]),
        )
        for _ in range(count)
    ]


def choices(layers: Sequence[LayerCost], *, candidates: Sequence[int]) -> dict[str, Any]:
    """Compare the formula's choice with the best of the simulated schedules."""
    same, apart, lost = 0, 0, []
    for layer in layers:
        chosen = best_num_chunks(layer, candidates=candidates)
        best = best_num_chunks(layer, seconds=simulated_seconds, candidates=candidates)
        same += chosen == best
        lost.append(simulated_seconds(layer, chosen) / simulated_seconds(layer, best) - 1)
        apart += chosen != best_num_chunks(layer.backward(), candidates=candidates)
    return {
        "layers": len(layers),
        "candidates": list(candidates),
        "same_as_exhaustive": same,
        "largest_loss": max(lost),
        "mean_loss": statistics.fmean(lost),
        "backward_differs_from_forward": apart,
    }


def least_seconds(actions: Sequence[Callable[[], Any]], *, repeats: int) -> list[float]:
    """Return the least time of each action; they take turns, so that load affects all."""
    times: list[list[float]] = [[] for _ in actions]
    for _ in range(repeats + 1):  # the first round warms up
        for action, each in zip(actions, times, strict=True):
            start = time.perf_counter()
            action()
            each.append(time.perf_counter() - start)
    return [min(each[1:]) for each in times]


def exchange_seconds(repeats: int) -> list[float]:
    """Return the seconds of an even all-to-all for each number of rows."""

    def all_to_all_of(rows: int) -> Callable[[], Any]:
        x, even = torch.randn(rows, DIM), [rows // RANKS] * RANKS
        return lambda: all_to_all(
            x, group=distributed.group.WORLD, input_splits=even, output_splits=even
        )

    return least_seconds([all_to_all_of(rows) for rows in ROWS], repeats=repeats)


def expert_seconds(repeats: int) -> list[float]:
    """Return the seconds of the experts of one layer for each number of rows."""
    feed = FeedForwardConfig(hidden=HIDDEN, activation=SwiGLU())
    grouped_experts = GroupedExperts(ExpertShape(EXPERTS, DIM, feed, bias=False)).requires_grad_(
        requires_grad=False
    )
    torch.nn.init.normal_(grouped_experts.up)
    torch.nn.init.normal_(grouped_experts.down)

    def experts_of(rows: int) -> Callable[[], Any]:
        x = torch.randn(rows, DIM)
        groups = group_by_expert(torch.arange(rows) % EXPERTS, num_experts=EXPERTS)
        return lambda: grouped_experts(x, groups=groups)

    return least_seconds([experts_of(rows) for rows in ROWS], repeats=repeats)


def measured(repeats: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    all_counts = run_on_ranks(RANKS, exchange_seconds, repeats, timeout_s=300)
    exchange = [max(times) for times in zip(*all_counts, strict=True)]
    experts = expert_seconds(repeats)
    lines = {"all_to_all": fit_cost(ROWS, exchange), "experts": fit_cost(ROWS, experts)}
    layer = LayerCost(*(StageCost(line.cost, ROWS[-1]) for line in lines.values()))
    degrees = OverlapDegrees(best_num_chunks(layer), best_num_chunks(layer.backward()))
    return {
        "rows": list(ROWS),
        "dim": DIM,
        "ranks": RANKS,
        "seconds": {"all_to_all": exchange, "experts": experts},
        "fits": {name: asdict(line) for name, line in lines.items()},
        "dispatch": f"ChunkedAllToAll(forward={degrees.forward}, backward={degrees.backward})",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/overlap.json"))
    options = parser.parse_args()
    all_counts = range(1, 17)
    result = {
        "two_links": choices(
            random_layers(options.layers, sliced=False), candidates=CHUNK_CANDIDATES
        ),
        "three_links": choices(
            random_layers(options.layers, sliced=True), candidates=CHUNK_CANDIDATES
        ),
        "three_links_1_to_16": choices(
            random_layers(options.layers, sliced=True), candidates=all_counts
        ),
        "measured": measured(options.repeats),
    }
    write_result(options.out, result)


if __name__ == "__main__":
    main()
