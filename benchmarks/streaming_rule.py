"""When is streaming free: the predicted and the measured number of tokens per expert.

    python benchmarks/streaming_rule.py --out benchmarks/results/streaming_rule.json

A stack of MoE layers is trained with its expert weights resident, and streamed from files behind a
token bucket, in turns. The bucket's rate is set so that the rule predicts the overlap point
``--point``. Where the streamed pass is bounded by the link its time does not depend on M, so the
measured overlap point is the M at which the resident time reaches it.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from support import write_result
from torch import Tensor, nn

from moesaic.memory.disk_store import DiskStore
from moesaic.memory.streaming_rule import (
    StreamingRates,
    hidden_backward_tokens,
    hidden_forward_tokens,
)
from moesaic.memory.tensor_store import Part
from moesaic.moe.config import MoE
from moesaic.moe.expert_capacity import Dropless
from moesaic.moe.expert_selection import SwitchTop1
from moesaic.moe.layer import MoELayer
from moesaic.moe.router_context import RouterState, TokenContext
from moesaic.moe.router_gate import LayerIndex
from moesaic.nn.feed_forward import FeedForwardConfig, ReLU
from moesaic.parallel.parameter_streaming import ParameterStream

TOKENS = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024)
WEIGHT_BYTES = 4


class ThrottledDisk(DiskStore):
    """A disk store whose transfers pass a token bucket of ``rate`` bytes per second."""

    rate = float("inf")
    _free_at = 0.0

    def _transfer(self, action: Any, parts: Sequence[Part], buffers: Sequence[Tensor]) -> None:
        start = max(self._free_at, time.perf_counter())
        self._free_at = start + sum(b.nbytes for b in buffers) / self.rate
        super()._transfer(action, parts, buffers)
        time.sleep(max(0.0, self._free_at - time.perf_counter()))


class Experts(nn.Module):
    """A stack of MoE layers with residual connections and nothing else."""

    def __init__(self, *, layers: int, experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        config = MoE(experts=experts, select=SwitchTop1(), limit=Dropless(), balance=())
        feed = FeedForwardConfig(hidden=hidden, activation=ReLU())
        self.layers = nn.ModuleList(
            MoELayer(
                config, dim=dim, feed_forward=feed, bias=False, layer_index=LayerIndex(f"layer.{i}")
            )
            for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        context, state = TokenContext.unbatched(len(x)), RouterState()
        for layer in self.layers:
            x = x + layer(x, context=context, router_state=state).out
        return x


@dataclass
class Timed:
    """Seconds of forward and of backward."""

    forward: float
    backward: float


def run(model: Experts, tokens: Tensor) -> Timed:
    """Time one pass each way."""
    started = time.perf_counter()
    loss = model(tokens).square().mean()
    middle = time.perf_counter()
    loss.backward()
    ended = time.perf_counter()
    for parameter in model.parameters():
        parameter.grad = None
    return Timed(middle - started, ended - middle)


def in_turns(models: dict[str, Experts], tokens: Tensor, *, rounds: int) -> dict[str, Timed]:
    """Return the shortest times of each model, measured in turns: other load only adds to them."""
    found: dict[str, list[Timed]] = {name: [] for name in models}
    for model in models.values():
        run(model, tokens)
    for _ in range(rounds):
        for name, model in models.items():
            found[name].append(run(model, tokens))
    return {
        name: Timed(min(t.forward for t in times), min(t.backward for t in times))
        for name, times in found.items()
    }


def crossing(points: list[tuple[float, float]], level: float) -> float | None:
    """Return the M at which times that grow with M reach a level, linear between points."""
    for (m0, t0), (m1, t1) in pairwise(points):
        if t0 <= level <= t1:
            return m0 + (m1 - m0) * (level - t0) / (t1 - t0)
    return None


def main() -> None:
    """Sweep M and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/streaming_rule.json"))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--point", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--note", default="")
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {"layers": given.layers, "experts": given.experts, "dim": given.dim}
    models = {}
    for name in ("resident", "streamed"):
        torch.manual_seed(0)
        models[name] = Experts(**sizes, hidden=given.hidden)
    weights = 2 * given.dim * given.hidden  # of an expert
    layer_bytes = given.experts * weights * WEIGHT_BYTES

    def tokens(per_expert: int) -> Tensor:
        return torch.randn(per_expert * given.experts, given.dim)

    # the rates of the products at the sizes where the rule is to hold
    point, per_pass = given.point, 2 * given.experts * weights * given.layers
    alone = {"resident": models["resident"]}
    forward = in_turns(alone, tokens(point), rounds=2 * given.rounds)["resident"].forward
    backward = in_turns(alone, tokens(point), rounds=2 * given.rounds)["resident"].backward
    flops = {"forward": per_pass * point / forward, "backward": 2 * per_pass * point / backward}
    fetch = WEIGHT_BYTES * flops["forward"] / (2 * point)
    rates = {way: StreamingRates(rate, fetch, float("inf")) for way, rate in flops.items()}
    predicted = {
        "forward": hidden_forward_tokens(rates["forward"], weight_bytes=WEIGHT_BYTES),
        "backward": hidden_backward_tokens(
            rates["backward"], weight_bytes=WEIGHT_BYTES, gradient_bytes=0
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        store = ThrottledDisk(
            Path(folder), device=torch.device("cpu"), label="weights", in_flight_bytes=2**30
        )
        ParameterStream(models["streamed"], store=store).move_to_tier()
        store.rate = fetch
        rows = []
        for per_expert in TOKENS:
            times = in_turns(models, tokens(per_expert), rounds=given.rounds)
            rows.append({"tokens_per_expert": per_expert} | summary(times))
            print(rows[-1], flush=True)
        store.close()
    result = {
        **sizes,
        "hidden": given.hidden,
        "flops_per_s": flops,
        "bytes_per_s": fetch,
        "layer_bytes": layer_bytes,
        "note": given.note,
        "predicted": predicted,
        "measured": {way: measured_point(rows, way=way) for way in ("forward", "backward")},
        "rows": rows,
    }
    write_result(given.out, result)


def summary(times: dict[str, Timed]) -> dict[str, float]:
    """Return the seconds of both models, and the streamed ones relative to the resident ones."""
    resident, streamed = times["resident"], times["streamed"]
    whole = streamed.forward + streamed.backward
    return {
        "resident_forward_s": resident.forward,
        "streamed_forward_s": streamed.forward,
        "resident_backward_s": resident.backward,
        "streamed_backward_s": streamed.backward,
        "step_ratio": whole / (resident.forward + resident.backward),
    }


def measured_point(rows: list[dict[str, float]], *, way: str) -> float | None:
    """Return the M at which the resident time is that of the link, of the three smallest M."""
    level = statistics.median(row[f"streamed_{way}_s"] for row in rows[:3])
    return crossing([(r["tokens_per_expert"], r[f"resident_{way}_s"]) for r in rows], level)


if __name__ == "__main__":
    main()
