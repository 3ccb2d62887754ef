"""Implementations to compare: dense layers, our MoE layer with several kernels, other libraries.

The other libraries are optional. They get our weights, so that their outputs can be compared.
"""

import contextlib
import importlib
import importlib.util
import io
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed, nn

from moesaic.bench.layer_workload import (
    Implementation,
    LayerWorkload,
    UnavailableImplementation,
    zipf_bias,
)
from moesaic.core.shapes import Tensor
from moesaic.moe.dispatcher import LocalDispatcher
from moesaic.moe.expert_selection import TopK
from moesaic.moe.experts import ExpertShape, GroupedExperts
from moesaic.moe.router_context import RouterContext
from moesaic.nn.feed_forward import FeedForwardConfig, SwiGLU
from moesaic.ops.kernel_selection import GROUPED_GEMMS, select_moe_kernel
from moesaic.ops.moe_kernel import Edges, MoEKernel, UnfusedMoEKernel


def dense(workload: LayerWorkload) -> Implementation:
    """A dense SwiGLU layer on tokens * k rows: the same matrix products without routing."""
    shape = workload.shape
    repeated = workload.x.repeat_interleave(shape.k, 0)
    x, up, down = (
        workload.leaf_copy(t) for t in (repeated, workload.up[0].t(), workload.down[0].t())
    )

    def forward() -> Tensor:
        gate, value = F.linear(x, up).chunk(2, -1)
        return F.linear(F.silu(gate) * value, down)

    return Implementation(
        "dense", forward, x, (up, down), workload.grad_out.repeat_interleave(shape.k, 0)
    )


def dense_compiled(workload: LayerWorkload) -> Implementation | UnavailableImplementation:
    """The dense layer under torch.compile."""
    eager = dense(workload)
    torch.compiler.reset()
    compiled: Callable[[], Tensor] = torch.compile(eager.forward)
    compiled_dense = Implementation(
        "dense-compiled", compiled, eager.x, eager.weights, eager.grad_out
    )
    try:
        compiled_dense.run()
    except Exception as error:  # e.g. no compiler for torch.compile
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return UnavailableImplementation(
            "dense-compiled", f"torch.compile does not run here: {first[:100]}"
        )
    return compiled_dense


def moesaic(workload: LayerWorkload, *, name: str = "moesaic") -> Implementation:
    """Router and experts with the kernel that is selected on this machine."""
    return _moe_layer(name, workload, kernel=select_moe_kernel(workload.x, activation=SwiGLU()))


def moesaic_bfloat16(workload: LayerWorkload) -> Implementation:
    """The same with bfloat16 weights."""
    half = replace(workload, up=workload.up.bfloat16(), down=workload.down.bfloat16())
    return moesaic(half, name="moesaic-bfloat16")


def moesaic_zipf(workload: LayerWorkload) -> Implementation:
    """The same with expert load proportional to 1 / rank."""
    logits = workload.x.float() @ workload.router_weight.float().t()
    gate = workload.router_weight.clone()
    gate[:, 0] += zipf_bias(logits, k=workload.shape.k)  # the first feature is one
    return moesaic(replace(workload, router_weight=gate), name="moesaic-zipf")


def unfused(gemm: str) -> Callable[[LayerWorkload], Implementation]:
    """The unfused kernel with a grouped GEMM by name."""

    def make(workload: LayerWorkload) -> Implementation:
        return _moe_layer(f"unfused-{gemm}", workload, kernel=UnfusedMoEKernel(GROUPED_GEMMS[gemm]))

    return make


def read_weights(workload: LayerWorkload) -> Implementation:
    """Read the weights of the selected experts once: the lower bound of decoding."""
    chosen = (
        (workload.x @ workload.router_weight.t()).topk(workload.shape.k).indices.unique().tolist()
    )
    up, down = workload.up, workload.down

    def forward() -> Tensor:
        sums = [up[e].sum() + down[e].sum() for e in chosen]
        return torch.stack(sums)

    return Implementation("read-weights", forward, workload.x.detach(), (), workload.grad_out)


class _ExpertsWithKernel(GroupedExperts):
    """Experts with a given kernel."""

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


def hugging_face(
    implementation: str,
) -> Callable[[LayerWorkload], Implementation | UnavailableImplementation]:
    """Mixtral's MoE block of ``transformers``, with one of its experts implementations."""
    name = f"hf-{implementation}"

    def make(workload: LayerWorkload) -> Implementation | UnavailableImplementation:
        if importlib.util.find_spec("transformers") is None:
            return UnavailableImplementation(name, "not installed: pip install transformers")
        config: Any = importlib.import_module("transformers").MixtralConfig
        modeling: Any = importlib.import_module("transformers.models.mixtral.modeling_mixtral")
        shape = workload.shape
        settings = config(
            hidden_size=shape.dim,
            intermediate_size=shape.hidden,
            num_local_experts=shape.experts,
            num_experts_per_tok=shape.k,
        )
        settings._experts_implementation = implementation
        block = modeling.MixtralSparseMoeBlock(settings).to(workload.x.dtype)
        with torch.no_grad():
            block.gate.weight.copy_(workload.router_weight)
            block.experts.gate_up_proj.copy_(workload.up.transpose(1, 2))
            block.experts.down_proj.copy_(workload.down.transpose(1, 2))
        return _from_module(name, workload, block, lambda x: block(x[None]))

    return make


def deepspeed(workload: LayerWorkload) -> Implementation | UnavailableImplementation:
    """DeepSpeed's ``MoE`` on one rank, without dropped tokens."""
    if importlib.util.find_spec("deepspeed") is None:
        return UnavailableImplementation(
            "deepspeed", "not installed: DS_BUILD_OPS=0 pip install deepspeed"
        )
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        package: Any = importlib.import_module("deepspeed")
        layer: Any = importlib.import_module("deepspeed.moe.layer")
        _init_single_rank_group(package)
        shape = workload.shape
        block = layer.MoE(
            shape.dim,
            _DeepSpeedExpert(shape.dim, shape.hidden),
            num_experts=shape.experts,
            k=shape.k,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        block.set_deepspeed_parallelism()
    block.to(workload.x.dtype)
    block.deepspeed_moe.gate.wg.float()
    experts = block.deepspeed_moe.experts.deepspeed_experts
    with torch.no_grad():
        block.deepspeed_moe.gate.wg.weight.copy_(workload.router_weight)
        for expert, up, down in zip(experts, workload.up, workload.down, strict=True):
            expert.up.weight.copy_(up.t())
            expert.down.weight.copy_(down.t())
    return _from_module("deepspeed", workload, block, lambda x: block(x)[0])


class _DeepSpeedExpert(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * value)


def _init_single_rank_group(package: Any) -> None:
    """Initialize a process group of one rank, which DeepSpeed requires."""
    if not distributed.is_initialized():
        folder = tempfile.mkdtemp(prefix="moesaic-bench-")
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
    package.init_distributed("gloo", verbose=False, auto_mpi_discovery=False)


def _from_module(
    name: str, workload: LayerWorkload, block: nn.Module, call: Callable[[Tensor], Tensor]
) -> Implementation:
    weights = tuple(block.parameters())
    for weight in weights:
        weight.requires_grad_(workload.runs_backward)
    x = workload.leaf_copy(workload.x)
    return Implementation(name, lambda: call(x).view(x.shape), x, weights, workload.grad_out)
