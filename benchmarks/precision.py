"""Loss of a small language model in each precision: float32, bfloat16 with and without a master.

Every precision reads the same rows of bytes (the Markdown of ``docs``) from the same weights. The
loss held out is that of the last tenth of each file. ``round to nearest`` has no master either: it
shows what stochastic rounding is for.

    python benchmarks/precision.py
"""

import argparse
import statistics
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from support import write_result

from moesaic.core.shapes import Float, Tensor
from moesaic.data.batch import Batch, InputRows
from moesaic.distributed.world import SingleProcess
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.optim.lr_schedule import WSD
from moesaic.optim.master_weights import MasterWeights, ShardUpdate, StochasticRounding
from moesaic.optim.optimizer import AdamW
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallelize import parallelize
from moesaic.parallel.precision import BFloat16, BFloat16Autocast, Float32, Precision
from moesaic.train.running_metrics import LossCategories
from moesaic.train.step import Objective

ROOT = Path(__file__).parent.parent
WIDTH, ROWS, MICRO_BATCHES = 48, 8, 2
MODEL = ModelConfig(
    vocab_size=256,
    dim=48,
    encoder=Stack(layers=0),
    decoder=Stack(layers=2, moe_every=1),
    attention=AttentionConfig(heads=3),
    feed_forward=FeedForwardConfig(hidden=96),
    moe=MoE(experts=4, select=TopK(k=2)),
)


class RoundToNearest(MasterWeights):
    """No copy, and updates below half a unit in the last place are lost."""

    @property
    def bytes_per_value(self) -> int:
        return 0

    def initial_state(self, parameter: Float[Tensor, "*N"]) -> dict[str, Tensor]:
        del parameter
        return {}

    def float32_values(
        self, parameter: Float[Tensor, "*N"], state: dict[str, Tensor]
    ) -> Float[Tensor, "*N"]:
        del state
        return parameter.float()

    def write_back(
        self, parameter: Float[Tensor, "*N"], values: Float[Tensor, "*N"], *, update: ShardUpdate
    ) -> None:
        del update
        parameter.copy_(values)


PRECISIONS: dict[str, Precision] = {
    "float32": Float32(),
    "bfloat16 autocast": BFloat16Autocast(),
    "bfloat16, float32 master": BFloat16(),
    "bfloat16, float32 master and gradients": BFloat16(gradients="float32"),
    "bfloat16, stochastic rounding": BFloat16(master=StochasticRounding()),
    "bfloat16, round to nearest": BFloat16(master=RoundToNearest()),
}


def texts() -> tuple[Tensor, Tensor]:
    """Return the bytes to train on and those held out."""
    parts = [torch.tensor(list(p.read_bytes())) for p in sorted((ROOT / "docs").rglob("*.md"))]
    cuts = [len(part) * 9 // 10 for part in parts]
    train = torch.cat([part[:cut] for part, cut in zip(parts, cuts, strict=True)])
    held = torch.cat([part[cut:] for part, cut in zip(parts, cuts, strict=True)])
    return train, held


def rows_of(text: Tensor, rows: int, generator: torch.Generator) -> Batch:
    start = torch.randint(len(text) - WIDTH - 1, (rows, 1), generator=generator)
    ids = text[start + torch.arange(WIDTH + 1)]
    key = torch.randint(2**62, (rows,), generator=generator)
    target = InputRows.full(ids[:, :-1].contiguous())
    labels, groups = ids[:, 1:].contiguous(), {"part": torch.zeros(rows, dtype=torch.long)}
    return Batch(InputRows.empty(rows), target, labels, groups, key)


def train(precision: Precision, *, seed: int, steps: int) -> dict[str, float]:
    """Train, and return the losses per byte and the bytes that a parameter takes."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    text, held = texts()
    model = Transformer(MODEL)
    parallel, world = ParallelConfig(), SingleProcess()
    parallel_model = parallelize(model, parallel=parallel, world=world, precision=precision)
    optimizer = AdamW(lr=3e-3).build(
        model.named_parameters(),
        kinds=model.parameter_kinds(),
        master_weights=precision.master_weights,
    )
    objective = Objective(LossCategories({"part": ("all",)}), precision)
    schedule, losses = WSD(warmup=10), []
    for step in range(steps):
        batches = [rows_of(text, ROWS, generator) for _ in range(MICRO_BATCHES)]
        result = objective.forward_backward(parallel_model, batches=batches)
        losses.append(float(result.sums.losses[0].sum()) / (ROWS * WIDTH * MICRO_BATCHES))
        parallel_model.clip_gradients(1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * schedule.lr_factor(step, steps=steps)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    found = [
        objective.losses(parallel_model, batch=rows_of(held, 64, torch.Generator().manual_seed(n)))
        for n in range(4)
    ]
    kept = sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    values = sum(p.numel() for p in model.parameters())
    weights = sum(p.nbytes for p in model.parameters())
    return {
        "train": statistics.mean(losses[-steps // 10 :]),
        "held_out": float(sum(f[0].sum() for f in found)) / (len(found) * 64 * WIDTH),
        "state_bytes": (weights + kept) / values + precision.gradient_dtype.itemsize,
    }


def of_seed(seed: int, *, steps: int) -> dict[str, dict[str, float]]:
    """Train in every precision from the weights of one seed."""
    torch.set_num_threads(1)
    return {name: train(p, seed=seed, steps=steps) for name, p in PRECISIONS.items()}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results/precision.json"
    )
    given = options.parse_args()
    with ProcessPoolExecutor(given.seeds) as pool:
        by_seed = list(pool.map(partial(of_seed, steps=given.steps), range(1, given.seeds + 1)))
    runs = {name: [found[name] for found in by_seed] for name in PRECISIONS}
    reference = [run["held_out"] for run in runs["float32"]]
    found = {}
    for name, each in runs.items():
        held = [run["held_out"] for run in each]
        over = [a - b for a, b in zip(held, reference, strict=True)]
        found[name] = {
            "held_out_nats_per_byte": [round(x, 4) for x in held],
            "over_float32_of_the_seed": [round(x, 4) for x in over],
            "mean_over_float32": round(statistics.mean(over), 4),
            "train": [round(run["train"], 4) for run in each],
            "bytes_per_parameter": round(each[0]["state_bytes"], 2),
        }
    write_result(given.out, {"steps": given.steps, "model": MODEL.to_dict(), "precisions": found})


if __name__ == "__main__":
    main()
