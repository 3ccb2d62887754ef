"""Contenders that need nothing but torch: the dense layer, ours, and ours by other paths."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from moesaic.bench.problem import UnavailableImplementation, Implementation, LayerWorkload
from moesaic.bench.shapes import zipf_bias
from moesaic.core.shapes import Tensor
from moesaic.moe.dispatch import LocalDispatcher
from moesaic.moe.experts import GroupedExperts, ExpertShape
from moesaic.moe.gate import RouterContext
from moesaic.moe.select import TopK
from moesaic.nn.activation import SwiGLU
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.ops.choose import GROUPED_GEMMS, select_moe_kernel
from moesaic.ops.mixture import UnfusedMoEKernel, Edges, MoEKernel


def dense(workload: LayerWorkload) -> Implementation:
    """One SwiGLU layer over as many rows as go through experts: the work without the choice."""
    shape = workload.shape
    repeated = workload.x.repeat_interleave(shape.k, 0)
    x, up, down = (workload.leaf_copy(t) for t in (repeated, workload.up[0].t(), workload.down[0].t()))

    def forward() -> Tensor:
        gate, value = F.linear(x, up).chunk(2, -1)
        return F.linear(F.silu(gate) * value, down)

    return Implementation("dense", forward, x, (up, down), workload.grad_out.repeat_interleave(shape.k, 0))


def dense_compiled(workload: LayerWorkload) -> Implementation | UnavailableImplementation:
    """The same through torch.compile."""
    eager = dense(workload)
    torch.compiler.reset()
    compiled: Callable[[], Tensor] = torch.compile(eager.forward)
    made = Implementation("dense-compiled", compiled, eager.x, eager.weights, eager.grad_out)
    try:
        made.run()
    except Exception as error:  # whatever is missing for torch.compile on this machine
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return UnavailableImplementation("dense-compiled", f"torch.compile does not run here: {first[:100]}")
    return made


def moesaic(workload: LayerWorkload, *, name: str = "moesaic") -> Implementation:
    """The layer as it is used: router, and the mixer that this machine takes."""
    return _moe_layer(name, workload, kernel=select_moe_kernel(workload.x, activation=SwiGLU()))


def moesaic_bfloat16(workload: LayerWorkload) -> Implementation:
    """The same with weights of half the size."""
    half = replace(workload, up=workload.up.bfloat16(), down=workload.down.bfloat16())
    return moesaic(half, name="moesaic-bfloat16")


def moesaic_zipf(workload: LayerWorkload) -> Implementation:
    """The same with the load of the experts proportional to 1 / rank."""
    logits = workload.x.float() @ workload.router_weight.float().t()
    gate = workload.router_weight.clone()
    gate[:, 0] += zipf_bias(logits, k=workload.shape.k)  # the first feature is one
    return moesaic(replace(workload, gate=gate), name="moesaic-zipf")


def unfused(gemm: str) -> Callable[[LayerWorkload], Implementation]:
    """The path without a compiler, with the engine of a name."""

    def make(problem: LayerWorkload) -> Implementation:
        return _moe_layer(f"composed-{gemm}", problem, kernel=UnfusedMoEKernel(GROUPED_GEMMS[gemm]))

    return make


def read_weights(workload: LayerWorkload) -> Implementation:
    """Only read the experts that are chosen, once: what decoding cannot go below."""
    chosen = (workload.x @ workload.router_weight.t()).topk(workload.shape.k).indices.unique().tolist()
    up, down = workload.up, workload.down

    def forward() -> Tensor:
        sums = [up[e].sum() + down[e].sum() for e in chosen]
        return torch.stack(sums)

    return Implementation("read-weights", forward, workload.x.detach(), (), workload.grad_out)


class _ExpertsWithKernel(GroupedExperts):
    """Experts that go by a mixer of our choice."""

    def __init__(self, workload: LayerWorkload, *, kernel: MoEKernel) -> None:
        shape = workload.shape
        feed_forward = FeedForwardConfig(hidden=shape.hidden, activation=SwiGLU())
        with torch.device("meta"):
            super().__init__(ExpertShape(shape.experts, shape.dim, feed_forward, bias=False))
        self.up = torch.nn.Parameter(workload.up.clone(), requires_grad=workload.runs_backward)
        self.down = torch.nn.Parameter(workload.down.clone(), requires_grad=workload.runs_backward)
        self.kernel = kernel

    def mix(self, x: Tensor, *, edges: Edges) -> Tensor:
        return self.kernel(x, edges=edges, weights=self.weights, activation=self.activation)


def _moe_layer(name: str, workload: LayerWorkload, *, kernel: MoEKernel) -> Implementation:
    x, gate = workload.leaf_copy(workload.x), workload.leaf_copy(workload.router_weight)
    experts, select, dispatcher = (
        _ExpertsWithKernel(workload, kernel=kernel),
        TopK(k=workload.shape.k),
        LocalDispatcher(),
    )

    def forward() -> Tensor:
        logits = F.linear(x, gate).float()
        routing = select(RouterContext.from_logits(logits, training=workload.runs_backward))
        return dispatcher.run_experts(x, routing=routing, experts=experts)

    return Implementation(name, forward, x, (gate, experts.up, experts.down), workload.grad_out)
