"""AdamW with 8-bit states, ours and torchao's, beside float32: loss, bytes, time of an update.

A small MoE language model learns a random Markov chain of second order; updates are timed on
square matrices, interleaved, the median of many. Usage::

    python benchmarks/eight_bit_states.py [--steps 150] [--seeds 2]
"""

import argparse
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from support import write_result
from torch import nn
from torchao.optim import AdamW8bit

from moesaic.data.batch import Batch, InputRows
from moesaic.model.config import AttentionConfig, ModelConfig, Stack
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.optim.optimizer import AdamW, EightBitStates

OUT = Path(__file__).parents[1] / "benchmarks/results/eight_bit_states.json"
WORDS, ROWS, TOKENS = 32, 16, 32
MODEL = ModelConfig(
    vocab_size=WORDS,
    dim=64,
    encoder=Stack(layers=0),
    decoder=Stack(layers=2, moe_every=1),
    attention=AttentionConfig(heads=4),
    feed_forward=FeedForwardConfig(hidden=128),
    moe=MoE(experts=8, select=TopK(k=2)),
)
CONFIG = AdamW(lr=3e-3, betas=(0.9, 0.95))
FORMS = ("float32", "8-bit", "torchao 8-bit")
SIDE, MATRICES, REPEATS = 2048, 4, 15  # of the timed updates: 16.8 million values


def batch_of(chain: torch.Tensor, *, seed: int) -> Batch:
    """Draw rows of a Markov chain ``[words, words, words]`` of second order."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORDS, (ROWS, 2), generator=generator)
    for _ in range(TOKENS - 1):
        following = torch.multinomial(chain[ids[:, -2], ids[:, -1]], 1, generator=generator)
        ids = torch.cat([ids, following], 1)
    empty, zero = torch.zeros(ROWS, 0, dtype=torch.long), torch.zeros(ROWS, dtype=torch.long)
    source, target = InputRows.full(empty), InputRows.full(ids[:, :-1])
    return Batch(source=source, target=target, labels=ids[:, 1:], groups={}, key=zero)


def build(form: str, named: Iterable[tuple[str, nn.Parameter]], kinds: dict[str, Any]) -> Any:
    """Return an optimizer whose states have a form."""
    if form == "torchao 8-bit":
        decay, betas = CONFIG.weight_decay, CONFIG.betas
        given = [parameter for _, parameter in named]
        return AdamW8bit(given, lr=CONFIG.lr, betas=betas, eps=CONFIG.eps, weight_decay=decay)
    config = CONFIG if form == "float32" else CONFIG.replace(states=EightBitStates())
    return config.build(named, kinds=kinds)


def time_updates() -> list[dict[str, Any]]:
    """Return the nanoseconds of an update for each value of large matrices."""
    optimizers: dict[str, Any] = {}
    for form in FORMS:
        weights = [nn.Parameter(torch.randn(SIDE, SIDE)) for _ in range(MATRICES)]
        for weight in weights:
            weight.grad = torch.randn(SIDE, SIDE)
        named = [(str(number), weight) for number, weight in enumerate(weights)]
        optimizers[form] = build(form, named, {name: "matrix" for name, _ in named})
        optimizers[form].step()  # makes the states, and compiles
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(REPEATS):
        for form, optimizer in optimizers.items():
            started = time.perf_counter()
            optimizer.step()
            seconds[form].append(time.perf_counter() - started)
    values = SIDE * SIDE * MATRICES
    return [{"states": form, "ns": 1e9 * median(each) / values} for form, each in seconds.items()]


def train(seed: int, *, form: str, steps: int) -> dict[str, float]:
    """Return the held-out loss and the bytes of states per parameter."""
    torch.manual_seed(seed)
    chain = torch.distributions.Dirichlet(torch.full((WORDS,), 0.05)).sample((WORDS, WORDS))
    model = Transformer(MODEL)
    optimizer = build(form, model.named_parameters(), dict(model.parameter_kinds()))

    def loss_of(number: int) -> torch.Tensor:
        batch = batch_of(chain, seed=number)
        output = model(batch)
        extra = sum(sum(record.losses.values()) for record in output.records)
        return model.loss(output).total / batch.num_predicted + extra * model.training

    for step in range(steps):
        loss_of(seed * 100_000 + step).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        held_out = mean(float(loss_of(10_000_000 + number)) for number in range(20))
    size = sum(map(_bytes, (t for state in optimizer.state.values() for t in state.values())))
    return {"loss": held_out, "bytes": size / sum(p.numel() for p in model.parameters())}


def _bytes(tensor: Any) -> int:
    parts = [getattr(tensor, name) for name in getattr(tensor, "tensor_attrs", ())]
    return sum(part.nbytes for part in parts) if parts else tensor.nbytes


def main() -> None:
    """Time updates, train with each form from each seed, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    updates = time_updates()
    torch.compiler.set_stance("force_eager")  # torchao compiles the update of each shape
    rows = [
        {"states": form, "seed": seed} | train(seed, form=form, steps=given.steps)
        for seed in range(given.seeds)
        for form in FORMS
    ]
    write_result(OUT, {"steps": given.steps, "runs": rows, "updates": updates})


if __name__ == "__main__":
    main()
