"""When is streaming free: the predicted and the measured number of tokens per expert.

    python benchmarks/streaming_rule.py --out benchmarks/results/streaming_rule.json

A stack of MoE layers is trained with its expert weights resident, and streamed from files behind a
token bucket. All sizes and both models take turns, and figures are medians over the rounds: load of
the machine falls on both sides alike.

The prediction is made before, from two measured rates of the contended pair: the passes while
weights arrive, and a layer's bytes over the time until they have arrived beside a pass. The bucket
is set so that the prediction is near ``--point``, where the products' rate is measured. Gradients
stay, so forward decides: it fetches as much as backward and computes half.

What is measured is where the curve of the streamed pass bends. Of L layers in turn, each takes c(M)
to compute, from the resident pass. Where the link is the bound, n fetches of f and a layer take
``n f + c(M)``; n is L in forward and L - 1 in backward, which has the last layer's weights. Where
the products are, L layers take ``L (c(M) + d)``, and forward the first fetch before: d is the copy
in place and what the transfer beside costs. f is that of the three smallest M, d of the four
largest; the bend is where c(M) + d reaches f.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from moesaic.memory.tensor_store import Access, Part, TensorStore
from moesaic.moe.config import MoE
from moesaic.moe.expert_capacity import Dropless
from moesaic.moe.expert_selection import SwitchTop1
from moesaic.moe.layer import MoELayer
from moesaic.moe.router_context import RouterState, TokenContext
from moesaic.moe.router_gate import LayerIndex
from moesaic.nn.feed_forward import FeedForwardConfig, ReLU
from moesaic.parallel.parameter_streaming import ParameterStream
from moesaic.parallel.partial_forward import BlockRange

TOKENS = (8, 16, 32, 64, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024)
WEIGHT_BYTES = 4
PASSES = 4  # fetches of all layers: a forward and a backward pass last about three


class ThrottledDisk(DiskStore):
    """A disk store whose transfers pass a token bucket of ``rate`` bytes per second."""

    rate = float("inf")
    _free_at = 0.0

    def _transfer(
        self, action: Any, parts: Sequence[Part], buffers: Sequence[Tensor], after: Any
    ) -> None:
        start = max(self._free_at, time.perf_counter())
        self._free_at = start + sum(b.nbytes for b in buffers) / self.rate
        super()._transfer(action, parts, buffers, after)
        time.sleep(max(0.0, self._free_at - time.perf_counter()))


class Experts(nn.Module):
    """A stack of MoE layers with residual connections and nothing else."""

    def __init__(self, *, layers: int, experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        config = MoE(experts=experts, select=SwitchTop1(), limit=Dropless(), balance=())
        feed = FeedForwardConfig(hidden=hidden, activation=ReLU())
        self.decoder = nn.ModuleList(
            MoELayer(
                config, dim=dim, feed_forward=feed, bias=False, layer_index=LayerIndex(f"layer.{i}")
            )
            for i in range(layers)
        )

    def stream(self, store: TensorStore) -> None:
        """Stream the weights of the experts from ``store``."""
        experts = {name for name, _ in self.named_parameters() if ".experts." in name}
        blocks = BlockRange(range(0), range(len(self.decoder)))
        ParameterStream(self, store=store, experts=experts, stages=[blocks]).move_to_tier()

    def forward(self, x: Tensor) -> Tensor:
        for number in range(len(self.decoder)):
            x = self.through(number, x)
        return x

    def through(self, number: int, x: Tensor) -> Tensor:
        """Return the output of one layer."""
        context, state = TokenContext.unbatched(len(x)), RouterState()
        return x + self.decoder[number](x, context=context, router_state=state).out


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


def median_of(times: Sequence[Timed]) -> Timed:
    """Return the medians of both ways."""
    return Timed(
        statistics.median(t.forward for t in times), statistics.median(t.backward for t in times)
    )


def sweep(
    models: dict[str, Experts], batches: dict[int, Tensor], *, rounds: int
) -> dict[int, dict[str, Timed]]:
    """Return the times of each size and model; each round has all of them, after one to warm up."""
    found: dict[tuple[int, str], list[Timed]] = {}
    for turn in range(rounds + 1):
        for size, tokens in batches.items():
            for name, model in models.items():
                timed = run(model, tokens)
                if turn:
                    found.setdefault((size, name), []).append(timed)
    return {size: {n: median_of(found[size, n]) for n in models} for size in batches}


def contended(
    model: Experts, store: ThrottledDisk, tokens: Tensor, *, rounds: int
) -> tuple[Timed, float]:
    """Return the seconds of both passes while weights arrive, and those until a layer's are there.

    The passes are timed beside fetches that outlast them. A fetch is timed from its start to its
    arrival, beside a layer's forward pass of half the tokens, which it outlasts.
    """
    layers = range(len(model.decoder))
    parts = [[Part(name) for name in store.specs if f".{i}." in name] for i in layers]
    targets = [torch.empty(store.specs[part.name].shape) for part in parts[0]]
    passes, fetches = [], []
    for turn in range(rounds + 1):
        under_way = [store.fetch(each, access=Access.READ) for each in PASSES * parts]
        timed = run(model, tokens)
        for each in under_way:
            each.wait()
            each.release()
        x, arrivals = tokens[::2], []
        for number in layers:
            started = time.perf_counter()
            fetched = store.fetch(parts[number], access=Access.READ)
            with torch.no_grad():
                x = model.through(number, x)
            weights = fetched.wait()
            arrivals.append(time.perf_counter() - started)
            for target, tensor in zip(targets, weights, strict=True):
                target.copy_(tensor)
            fetched.release()
        if turn:
            passes.append(timed)
            fetches.append(statistics.mean(arrivals))
    return median_of(passes), statistics.median(fetches)


def crossing(points: list[tuple[float, float]], level: float) -> float | None:
    """Return the M at which times that grow with M reach a level, linear between points."""
    for (m0, t0), (m1, t1) in pairwise(points):
        if t0 <= level <= t1:
            return m0 + (m1 - m0) * (level - t0) / (t1 - t0)
    return None


def main() -> None:
    """Sweep M and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "streaming_rule.json"
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--point", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
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

    batches = {m: torch.randn(m * given.experts, given.dim) for m in TOKENS}
    per_pass = 2 * given.layers * given.experts * weights * given.point  # FLOPs of forward
    alone = sweep({"resident": models["resident"]}, {0: batches[given.point]}, rounds=given.rounds)
    with tempfile.TemporaryDirectory() as folder:
        store = ThrottledDisk(
            Path(folder), device=torch.device("cpu"), label="weights", in_flight_bytes=2**30
        )
        models["streamed"].stream(store)
        store.rate = layer_bytes * given.layers / alone[0]["resident"].forward
        resident, near = models["resident"], batches[given.point]
        timed, fetch_s = contended(resident, store, near, rounds=given.rounds)
        store.rate *= fetch_s / (timed.forward / given.layers)  # F is then measured near M*
        timed, fetch_s = contended(resident, store, near, rounds=given.rounds)
        forward = StreamingRates(per_pass / timed.forward, layer_bytes / fetch_s, math.inf)
        # backward computes twice as much, so its overlap point is near half the tokens
        timed, _ = contended(resident, store, near[::2], rounds=given.rounds)
        backward = replace(forward, flops=per_pass / timed.backward)
        predicted = {
            "forward": hidden_forward_tokens(forward, weight_bytes=WEIGHT_BYTES),
            "backward": hidden_backward_tokens(
                backward, weight_bytes=WEIGHT_BYTES, gradient_bytes=0
            ),
        }
        print(predicted, flush=True)
        times = sweep(models, batches, rounds=given.rounds)
        store.close()
    measured = {way: overlap_point(times, way=way, layers=given.layers) for way in predicted}
    rows = [{"tokens_per_expert": size} | summary(each) for size, each in times.items()]
    hidden = [r for r in rows if r["tokens_per_expert"] >= 1.2 * predicted["forward"]]
    result = {
        **sizes,
        "hidden": given.hidden,
        "flops_per_s": {"forward": forward.flops, "backward": backward.flops},
        "bytes_per_s": forward.fetch,
        "bucket_bytes_per_s": store.rate,
        "layer_bytes": layer_bytes,
        "note": given.note,
        "predicted": predicted,
        "measured": measured,
        "measured_over_predicted": {
            way: (found["tokens_per_expert"] or math.nan) / predicted[way]
            for way, found in measured.items()
        },
        "largest_step_ratio_from_1.2_predicted_on": max(r["step_ratio"] for r in hidden),
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


def overlap_point(
    times: dict[int, dict[str, Timed]], *, way: str, layers: int
) -> dict[str, float | None]:
    """Return the M at which the streamed pass bends, and the seconds f and d (see above)."""
    sizes, forward = list(times), way == "forward"
    layer = {size: vars(times[size]["resident"])[way] / layers for size in sizes}
    streamed = {size: vars(times[size]["streamed"])[way] for size in sizes}
    fetches = layers if forward else layers - 1
    fetch = statistics.median((streamed[m] - layer[m]) / fetches for m in sizes[:3])
    more = statistics.median(
        (streamed[m] - forward * fetch) / layers - layer[m] for m in sizes[-4:]
    )
    point = crossing(list(layer.items()), fetch - more)
    return {"tokens_per_expert": point, "fetch_s": fetch, "more_per_layer_s": more}


if __name__ == "__main__":
    main()
