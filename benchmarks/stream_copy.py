"""Expert weights streamed from host memory: copied on a thread beside products, or in turn.

A stack of MoE layers takes forward and backward passes in three ways, in turns; figures are
ratios to resident weights. Usage::

    python benchmarks/stream_copy.py [--rounds 15] [--hidden 1024]
"""

import argparse
from concurrent.futures import Executor, Future
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from streaming_rule import Experts, run
from support import write_result

from moesaic.bench.paired_timing import measure_in_turns, ratio_to_baseline
from moesaic.memory.tier import HostMemory
from moesaic.parallel import parameter_streaming

OUT = Path(__file__).parents[1] / "benchmarks/results/stream_copy.json"
TOKENS = (64, 256, 1024)  # per expert
LAYERS, EXPERTS, DIM = 6, 4, 256


class InTurn(Executor):
    """Copies where it is asked for: nothing computes meanwhile."""

    def submit(self, function: Any, /, *args: Any, **named: Any) -> "Future[Any]":
        done: Future[Any] = Future()
        done.set_result(function(*args, **named))
        return done


def streamed(model: Experts) -> Experts:
    """Stream the weights of a model from host memory."""
    model.stream(HostMemory().open(device=torch.device("cpu"), label="weights"))
    return model


def main() -> None:
    """Time all three ways and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--hidden", type=int, default=1024)
    given = parser.parse_args()
    torch.set_num_threads(1)  # a core for products, one for the copy

    def made() -> Experts:
        torch.manual_seed(0)
        return Experts(layers=LAYERS, experts=EXPERTS, dim=DIM, hidden=given.hidden)

    with patch.object(parameter_streaming, "ThreadPoolExecutor", lambda *_, **__: InTurn()):
        in_turn = streamed(made())
    models = {"resident": made(), "thread": streamed(made()), "in turn": in_turn}
    rows = []
    for tokens in TOKENS:
        x = torch.randn(tokens * EXPERTS, DIM)
        passes = {name: partial(run, model, x) for name, model in models.items()}
        times = measure_in_turns(passes, baseline="resident", rounds=given.rounds)
        base = times["resident"]
        ratios = {n: asdict(ratio_to_baseline(t, base)) for n, t in times.items() if t is not base}
        rows.append({"tokens_per_expert": tokens, "ratios": ratios})
    write_result(OUT, {"rows": rows})


if __name__ == "__main__":
    main()
