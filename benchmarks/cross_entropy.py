"""Loss over a large vocabulary: chunks of some bytes, of 2**21 logits, and all logits at once.

Forward and backward in float32, taking turns; ratios to all logits at once (``F.cross_entropy``).
``counted`` has the chunks and bytes of large vocabularies, which no memory here would hold.

    python benchmarks/cross_entropy.py
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from support import write_result

from moesaic.bench.paired_timing import measure_in_turns, ratio_to_baseline
from moesaic.core.shapes import Tensor
from moesaic.ops.chunk_sizes import CPU_CHUNKS, use_chunk_sizes
from moesaic.ops.cross_entropy import cross_entropy, tokens_per_chunk

SHAPES = ((1024, 8000, 256), (512, 32_000, 256), (64, 163_840, 256))
LARGE = ((6144, 163_840, 7168), (16_384, 163_840, 7168), (6144, 327_680, 7168))
EARLIER_BYTES = 4 << 21


def all_at_once(hidden: Tensor, weight: Tensor, label: Tensor) -> None:
    F.cross_entropy(hidden @ weight.t(), label, reduction="sum").backward()


def in_chunks(hidden: Tensor, weight: Tensor, label: Tensor, *, budget: int) -> None:
    with use_chunk_sizes(replace(CPU_CHUNKS, logits=budget)):
        cross_entropy(hidden, weight=weight, label=label).total.backward()


def measured(tokens: int, words: int, dim: int, *, rounds: int) -> dict[str, Any]:
    hidden = torch.randn(tokens, dim, requires_grad=True)
    weight = (torch.randn(words, dim) * dim**-0.5).requires_grad_()
    inputs = (hidden, weight, torch.randint(words, (tokens,)))
    runs: dict[str, Callable[[], None]] = {
        "all logits": partial(all_at_once, *inputs),
        "2**21 logits": partial(in_chunks, *inputs, budget=EARLIER_BYTES),
        "64 MiB": partial(in_chunks, *inputs, budget=CPU_CHUNKS.logits),
    }
    for run in runs.values():
        run()
    times = measure_in_turns(runs, baseline="all logits", rounds=rounds)
    ratios = {n: ratio_to_baseline(times[n], times["all logits"]) for n in list(runs)[1:]}
    return {
        name: {
            "ratio": round(found.median, 2),
            "quartiles": [round(q, 2) for q in found.quartiles],
            "best_over_best": round(found.best_over_best, 2),
        }
        for name, found in ratios.items()
    }


def counted(tokens: int, words: int, dim: int) -> dict[str, int]:
    """Return the chunks on an accelerator in bfloat16, and the bytes of the table's gradient."""
    table = torch.empty(words, dim, dtype=torch.bfloat16, device="meta")
    per_chunk = tokens_per_chunk(table, dtype=torch.bfloat16)
    earlier = max(1, (1 << 21) // words)
    gradient = words * dim * 4
    return {
        "tokens_per_chunk": per_chunk,
        "chunks": -(-tokens // per_chunk),
        "chunks_of_2**21_logits": -(-tokens // earlier),
        "logit_bytes": min(tokens, per_chunk) * words * 2,
        "table_gradient_bytes": gradient,
        "table_gradient_traffic": 2 * gradient * -(-tokens // per_chunk),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=10)
    out = Path(__file__).parent / "results/cross_entropy.json"
    options.add_argument("--out", type=Path, default=out)
    given = options.parse_args()
    torch.set_num_threads(1)
    result = {
        "rounds": given.rounds,
        "measured": {
            f"{t} x {v} x {d}": measured(t, v, d, rounds=given.rounds) for t, v, d in SHAPES
        },
        "counted": {f"{t} x {v} x {d}": counted(t, v, d) for t, v, d in LARGE},
    }
    write_result(given.out, result)


if __name__ == "__main__":
    main()
