"""Compiled experts: the experts of a layer as one operation of a ``torch.compile`` graph.

The kernels of a layer read sizes on the host, which a graph cannot hold. The operation calls them
as they are; its backward pass computes the layer once more and differentiates it, so a graph saves
the inputs alone (as activation checkpointing of the experts does).

Letters: T tokens, N edges, E experts, D model dim, F feed-forward dim, G pre-activation width.
"""

from typing import Any

import torch

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.nn.feed_forward import GELU, Activation, ReLU, SquaredReLU, SwiGLU
from moesaic.ops.grouped_gemm import FeedForwardWeights
from moesaic.ops.kernel_selection import select_moe_kernel
from moesaic.ops.moe_kernel import Edges
from moesaic.ops.permute import group_by_expert

_ACTIVATIONS: dict[str, Activation] = {
    rule.kernel_name: rule for rule in (ReLU(), GELU(), SquaredReLU(), SwiGLU())
}


def is_compilable(activation: object) -> bool:
    """Whether the operation has the activation, under the name of its kernel."""
    return any(activation == known for known in _ACTIVATIONS.values())


def run_compiled_experts(
    x: Float[Tensor, "T D"], *, edges: Edges, weights: FeedForwardWeights, kernel_name: str
) -> Float[Tensor, "T D"]:
    """Return each token's weighted sum of expert outputs, as an operation of a graph."""
    floats = [x, edges.weight, weights.up, weights.down]
    floats += [bias for bias in (weights.up_bias, weights.down_bias) if bias is not None]
    return _experts(floats, edges.token, _expert_of_edge(edges), edges.per_token, kernel_name)


def _expert_of_edge(edges: Edges) -> Int[Tensor, "N"]:
    """Return the expert of each edge; the number of experts where the edge is dropped."""
    groups = edges.groups
    row = torch.arange(groups.order.numel(), device=groups.order.device, dtype=torch.int32)
    return torch.searchsorted(groups.offsets, row, right=True)[groups.inverse]


@torch.library.custom_op("moesaic::experts", mutates_args=())
def _experts(
    floats: list[Tensor], token: Tensor, expert: Tensor, per_token: int, kernel_name: str
) -> Tensor:
    return _run(floats, token, expert=expert, per_token=per_token, kernel_name=kernel_name)


@torch.library.custom_op("moesaic::experts_backward", mutates_args=())
def _experts_backward(
    grad: Tensor,
    floats: list[Tensor],
    token: Tensor,
    expert: Tensor,
    per_token: int,
    kernel_name: str,
) -> list[Tensor]:
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in floats]
        out = _run(leaves, token, expert=expert, per_token=per_token, kernel_name=kernel_name)
    return [g.contiguous() for g in torch.autograd.grad(out, leaves, grad.contiguous())]


def _run(
    floats: list[Tensor], token: Tensor, *, expert: Tensor, per_token: int, kernel_name: str
) -> Tensor:
    x, weight, *matrices = floats
    groups = group_by_expert(expert, num_experts=matrices[0].shape[0])
    activation = _ACTIVATIONS[kernel_name]
    return select_moe_kernel(x, activation=activation)(
        x,
        edges=Edges(token, weight, groups, x.shape[0], per_token),
        weights=FeedForwardWeights(*matrices),
        activation=activation,
    )


@_experts.register_fake
def _(floats: list[Tensor], *_: Any) -> Tensor:
    return torch.empty_like(floats[0], memory_format=torch.contiguous_format)


@_experts_backward.register_fake
def _(_grad: Tensor, floats: list[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in floats]


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    floats, token, expert, *ctx.options = inputs
    ctx.save_for_backward(token, expert, *floats)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    token, expert, *floats = ctx.saved_tensors
    return _experts_backward(grad, floats, token, expert, *ctx.options), None, None, None, None


_experts.register_autograd(_backward, setup_context=_save_inputs)
