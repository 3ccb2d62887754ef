"""Workloads of layer_gpu.py: shapes, tensors, and the implementations that are compared."""

import importlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from triton_interpreter import is_interpreted

from moesaic.ops.grouped_gemm import FeedForwardWeights, GroupedMM
from moesaic.ops.moe_kernel import Edges, MoEKernel, UnfusedMoEKernel
from moesaic.ops.permute import group_by_expert
from moesaic.ops.triton.tiles import Tiles
from moesaic.ops.triton.triton_moe_kernel import TritonMoEKernel

Tensor = torch.Tensor


@dataclass(frozen=True)
class Shape:
    """T tokens, D model dim, F feed-forward dim, E experts, K experts per token."""

    tokens: int
    dim: int
    hidden: int
    experts: int
    k: int

    @property
    def flops(self) -> int:
        """FLOPs of a forward pass: three products of D by F for every edge."""
        return 6 * self.tokens * self.k * self.dim * self.hidden

    def __str__(self) -> str:
        return f"{self.tokens},{self.dim},{self.hidden},{self.experts},{self.k}"


class SwiGLU:
    """SwiGLU without the package requirements of ``nn/feed_forward.py``."""

    kernel_name = "swiglu"

    def __call__(self, x: Tensor, /) -> Tensor:
        gate, value = x.chunk(2, -1)
        return F.silu(gate) * value


@dataclass(frozen=True)
class Problem:
    """Rows, a router output, weights, and an output gradient."""

    shape: Shape
    x: Tensor
    expert: Tensor
    weight: Tensor
    token: Tensor
    up: Tensor
    down: Tensor
    back: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.weight, self.up, self.down]

    def edges(self) -> Edges:
        """Sort by expert; every implementation starts from the router output, so its time includes
        this."""
        groups = group_by_expert(self.expert.flatten(), num_experts=self.shape.experts)
        number = self.shape.tokens, self.shape.k
        return Edges(self.token, self.weight.flatten(), groups, *number)


def make(shape: Shape, *, device: str, dtype: torch.dtype, seed: int = 0) -> Problem:
    draw = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=draw, device=device).mul_(scale).to(dtype)

    t, d, f, e, k = shape.tokens, shape.dim, shape.hidden, shape.experts, shape.k
    logits = torch.randn(t, e, generator=draw, device=device)
    top = logits.softmax(-1).topk(k)
    return Problem(
        shape=shape,
        x=normal(t, d).requires_grad_(),
        expert=top.indices,
        weight=top.values.clone().requires_grad_(),
        token=torch.arange(t, device=device).repeat_interleave(k),
        up=normal(e, d, 2 * f, scale=d**-0.5).requires_grad_(),
        down=normal(e, f, d, scale=f**-0.5).requires_grad_(),
        back=normal(t, d),
    )


@dataclass(frozen=True)
class Side:
    """``forward`` from the router output to the layer output; ``leaves`` get gradients."""

    name: str
    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    both: Callable[[], Any]


def side(name: str, forward: Callable[[], Tensor], leaves: list[Tensor], back: Tensor) -> Side:
    return Side(name, forward, leaves, lambda: torch.autograd.grad(forward(), leaves, back))


def with_kernel(p: Problem, kernel: MoEKernel, *, name: str) -> Side:
    weights = FeedForwardWeights(p.up, p.down)

    def forward() -> Tensor:
        return kernel(p.x, edges=p.edges(), weights=weights, activation=SwiGLU())

    return side(name, forward, p.leaves, p.back)


def hugging_face(p: Problem) -> Side:
    """The experts of a transformers block, as its ``grouped_mm`` runs them."""
    model = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
    s = p.shape
    config = SimpleNamespace(
        num_experts=s.experts, hidden_size=s.dim, moe_intermediate_size=s.hidden,
        hidden_act="silu", _experts_implementation="grouped_mm",
    )  # fmt: skip
    with torch.device("meta"):
        experts = model.Qwen3MoeExperts(config)
    for name, expert_weight in (("gate_up_proj", p.up), ("down_proj", p.down)):
        transposed = expert_weight.detach().transpose(1, 2).contiguous()
        setattr(experts, name, torch.nn.Parameter(transposed))
    weight = p.weight.detach().to(p.x.dtype).requires_grad_()
    leaves = [p.x, weight, experts.gate_up_proj, experts.down_proj]
    return side("hf_grouped_mm", lambda: experts(p.x, p.expert, weight), leaves, p.back)


def scattermoe(p: Problem, folder: Path) -> Side:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    mlp = importlib.import_module("scattermoe.mlp")
    s = p.shape
    module = mlp.GLUMLP(s.dim, s.hidden, s.experts, s.k).to(p.x.device, p.x.dtype)
    with torch.no_grad():  # its gate and value halves are swapped, its matrices transposed
        gate, value = p.up.chunk(2, -1)
        module.experts.weight.copy_(torch.cat([value, gate], -1).transpose(1, 2))
        module.output_experts.weight.copy_(p.down.transpose(1, 2))
    weight = p.weight.detach().to(p.x.dtype).requires_grad_()
    leaves = [p.x, weight, module.experts.weight, module.output_experts.weight]
    return side("scattermoe", lambda: module(p.x, weight, p.expert), leaves, p.back)


def cublas(p: Problem) -> Side:
    """Dense matrix products of the same rows: the upper bound for a layer of the same FLOPs."""
    s, like = p.shape, {"device": p.x.device, "dtype": p.x.dtype}
    rows = s.tokens * s.k
    a, b = torch.randn(rows, s.dim, **like), torch.randn(rows, s.hidden, **like)
    h, y = torch.randn(rows, 2 * s.hidden, **like), torch.randn(rows, s.dim, **like)
    up, down = torch.randn(s.dim, 2 * s.hidden, **like), torch.randn(s.hidden, s.dim, **like)
    out_h, out_y, out_b = torch.empty_like(h), torch.empty_like(y), torch.empty_like(b)
    out_up, out_down = torch.empty_like(up), torch.empty_like(down)

    def forward() -> Tensor:
        torch.mm(a, up, out=out_h)
        return torch.mm(b, down, out=out_y)

    def both() -> None:
        forward()
        torch.mm(y, down.t(), out=out_b)
        torch.mm(b.t(), y, out=out_down)
        torch.mm(h, up.t(), out=out_y)
        torch.mm(a.t(), h, out=out_up)

    return Side("cublas", forward, [], both)


def sides_of(
    p: Problem, *, ours: dict[str, Tiles | None], scatter: Path | None, say: Callable[[str], None]
) -> list[Side]:
    """Every implementation that runs here; the others are reported with the reason."""
    builders: dict[str, Callable[[], Side]] = {
        name: lambda name=name, tiles=tiles: with_kernel(p, TritonMoEKernel(tiles=tiles), name=name)
        for name, tiles in ours.items()
    }
    builders["grouped_mm"] = lambda: with_kernel(
        p, UnfusedMoEKernel(GroupedMM()), name="grouped_mm"
    )
    builders["hf_grouped_mm"] = lambda: hugging_face(p)
    if scatter is not None:
        builders["scattermoe"] = lambda: scattermoe(p, scatter)
    builders["cublas"] = lambda: cublas(p)
    found = []
    for name, build in builders.items():
        try:
            found.append(build())
        except Exception as error:
            say(f"{name} is absent: {type(error).__name__}: {error}")
    return found


def wait() -> None:
    if not is_interpreted():
        torch.cuda.synchronize()


def milliseconds(work: Callable[[], Any], *, repeats: int) -> float:
    """Time of one call on the device, the mean over ``repeats`` calls queued together."""
    if is_interpreted():
        began = time.perf_counter()
        work()
        return (time.perf_counter() - began) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def interleaved(
    works: dict[str, Callable[[], Any]], *, rounds: int, repeats: int, left: Callable[[], float]
) -> dict[str, list[float]]:
    """Times of each function, round by round; one that raises is left out."""
    times: dict[str, list[float]] = {}
    warm_ups, rounds = (0, 1) if is_interpreted() else (3, rounds)
    for name, work in list(works.items()):
        try:
            for _ in range(warm_ups):
                work()
            wait()
            times[name] = []
        except Exception as error:
            times[f"{name} failed: {type(error).__name__}: {str(error)[:200]}"] = []
    alive = [name for name in times if name in works]
    for _ in range(rounds):
        if left() < 0 and min(map(len, times.values()), default=0) > 0:
            break
        for name in alive:
            times[name].append(milliseconds(works[name], repeats=repeats))
    return times


def spread(times: Sequence[float]) -> dict[str, float]:
    if not times:
        return {}
    return {
        "median_ms": statistics.median(times),
        "min_ms": min(times),
        "max_ms": max(times),
        "rounds": len(times),
    }
