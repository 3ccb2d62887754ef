"""Expert weights streamed from host memory: copied on a thread beside products, or in turn.

A stack of MoE layers takes forward and backward passes in three ways, in turns; figures are the
seconds beside those with resident weights. Usage::

    python benchmarks/stream_copy.py [--rounds 15] [--hidden 1024]
"""

import argparse
import statistics
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from streaming_rule import Experts, run
from support import write_result

from moesaic.memory.tier import HostMemory
from moesaic.parallel import parameter_streaming
from moesaic.parallel.parameter_streaming import ParameterStream

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
    store = HostMemory().open(device=torch.device("cpu"), label="weights")
    ParameterStream(model, store=store).move_to_tier()
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
        x, seconds = torch.randn(tokens * EXPERTS, DIM), {name: [] for name in models}
        for turn in range(given.rounds + 1):
            for name, model in models.items():
                timed = run(model, x)
                if turn:
                    seconds[name].append(timed.forward + timed.backward)
        base = statistics.median(seconds["resident"])
        ratios = {n: sorted(s / base for s in found) for n, found in seconds.items()}
        rows.append({"tokens_per_expert": tokens, "resident_seconds": base})
        for name, found in ratios.items():
            quarter = len(found) // 4
            rows[-1][name] = [statistics.median(found), found[quarter], found[-1 - quarter]]
    write_result(OUT, {"columns": ["median", "quartile 1", "quartile 3"], "rows": rows})


if __name__ == "__main__":
    main()
