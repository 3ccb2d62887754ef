"""AdamW with 8-bit states (torchao) beside float32 states: held-out loss and bytes, seeded.

A small MoE language model learns a random Markov chain of second order. Usage::

    python benchmarks/eight_bit_states.py [--steps 300] [--seeds 3]
"""

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from support import write_result
from torchao.optim import AdamW8bit

from moesaic.data.batch import Batch, InputRows
from moesaic.model.config import AttentionConfig, ModelConfig, Stack
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.optim.optimizer import AdamW

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


def train(seed: int, *, bits: int, steps: int) -> dict[str, float]:
    """Return the held-out loss and the bytes of states per parameter."""
    torch.manual_seed(seed)
    chain = torch.distributions.Dirichlet(torch.full((WORDS,), 0.05)).sample((WORDS, WORDS))
    model = Transformer(MODEL)
    if bits == 32:
        optimizer: torch.optim.Optimizer = CONFIG.build(
            model.named_parameters(), kinds=model.parameter_kinds()
        )
    else:
        decay, betas = CONFIG.weight_decay, CONFIG.betas
        optimizer = AdamW8bit(
            model.parameters(), lr=CONFIG.lr, betas=betas, eps=CONFIG.eps, weight_decay=decay
        )

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
    """Train both ways from each seed and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.compiler.set_stance("force_eager")  # torchao compiles the update of each shape
    rows = [
        {"bits": bits, "seed": seed} | train(seed, bits=bits, steps=given.steps)
        for seed in range(given.seeds)
        for bits in (32, 8)
    ]
    write_result(OUT, {"steps": given.steps, "runs": rows})


if __name__ == "__main__":
    main()
