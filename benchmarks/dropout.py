"""Cost of dropout by token key, compared with torch's dropout, which uses the rank's random stream.

Forward and backward in float32 on one thread, taking turns: medians of paired ratios.

    python benchmarks/dropout.py
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from support import write_result
from torch import nn

from moesaic.bench.paired_timing import measure_in_turns, ratio_to_baseline
from moesaic.core.shapes import Tensor
from moesaic.ops.counter_rng import dropout

SHAPES = ((2048, 512), (8192, 512), (2048, 2048))
RATE = 0.1


def both_ways(dropout: Callable[[Tensor], Tensor], x: Tensor) -> None:
    dropout(x).backward(x.detach())


def ratio(tokens: int, dim: int, *, rounds: int) -> dict[str, float | list[float]]:
    x = torch.randn(tokens, dim, requires_grad=True)
    key = torch.randint(2**62, (tokens,))
    implementations = {
        "torch": partial(both_ways, nn.Dropout(RATE), x),
        "token": partial(both_ways, partial(dropout, key=key, rate=RATE), x),
    }
    for run in implementations.values():
        run()
    times = measure_in_turns(implementations, baseline="torch", rounds=rounds)
    found = ratio_to_baseline(times["token"], times["torch"])
    return {
        "ratio": round(found.median, 2),
        "quartiles": [round(q, 2) for q in found.quartiles],
        "best_over_best": round(found.best_over_best, 2),
        "best_ms": round(1e3 * min(times["token"].seconds.values()), 2),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=40)
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results/dropout.json")
    given = options.parse_args()
    torch.set_num_threads(1)
    shapes = {f"{t} x {d}": ratio(t, d, rounds=given.rounds) for t, d in SHAPES}
    write_result(given.out, {"rate": RATE, "rounds": given.rounds, "shapes": shapes})


if __name__ == "__main__":
    main()
