"""Adapters to other libraries, each of them optional: found, or said to be absent.

They get our weights, so that their answers can be compared with ours.
"""

import contextlib
import importlib
import importlib.util
import io
import logging
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed, nn

from moesaic.bench.problem import UnavailableImplementation, Implementation, LayerWorkload
from moesaic.core.shapes import Tensor


def hugging_face(implementation: str) -> Callable[[LayerWorkload], Implementation | UnavailableImplementation]:
    """Mixtral's sparse block of ``transformers``, with one of its ways to compute experts."""
    name = f"hf-{implementation}"

    def make(problem: LayerWorkload) -> Implementation | UnavailableImplementation:
        if importlib.util.find_spec("transformers") is None:
            return UnavailableImplementation(name, "not installed: pip install transformers")
        config: Any = importlib.import_module("transformers").MixtralConfig
        room: Any = importlib.import_module("transformers.models.mixtral.modeling_mixtral")
        shape = problem.shape
        settings = config(
            hidden_size=shape.dim,
            intermediate_size=shape.hidden,
            num_local_experts=shape.experts,
            num_experts_per_tok=shape.k,
        )
        settings._experts_implementation = implementation
        block = room.MixtralSparseMoeBlock(settings).to(problem.x.dtype)
        with torch.no_grad():
            block.gate.weight.copy_(problem.router_weight)
            block.experts.gate_up_proj.copy_(problem.up.transpose(1, 2))
            block.experts.down_proj.copy_(problem.down.transpose(1, 2))
        return _from_module(name, problem, block, lambda x: block(x[None]))

    return make


def deepspeed(workload: LayerWorkload) -> Implementation | UnavailableImplementation:
    """DeepSpeed's ``MoE`` on one rank, dropping nothing."""
    if importlib.util.find_spec("deepspeed") is None:
        return UnavailableImplementation("deepspeed", "not installed: DS_BUILD_OPS=0 pip install deepspeed")
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
    """A world of one rank, as DeepSpeed wants."""
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
