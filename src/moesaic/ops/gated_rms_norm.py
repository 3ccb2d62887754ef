"""Gated RMSNorm: the norm of ``x * silu(gate)`` within groups of channels (Mamba-2, 2405.21060).

Letters: T tokens, C channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from moesaic.core.shapes import Float, Tensor


def gated_rms_norm(
    x: Float[Tensor, "T C"],
    *,
    gate: Float[Tensor, "T C"],
    weight: Float[Tensor, "C"],
    groups: int,
    eps: float,
) -> Float[Tensor, "T C"]:
    """``u / sqrt(mean of u^2 in the group + eps) * weight`` with ``u = x * silu(gate)``.

    Computes in float32. Autograd saves the inputs only.
    """
    return _GatedRMSNorm.apply(x, gate, weight, groups, eps)


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, ctx.groups, ctx.eps = inputs
        ctx.save_for_backward(*tensors)
        return _normalise(*tensors, groups=ctx.groups, eps=ctx.eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = _normalise(*inputs, groups=ctx.groups, eps=ctx.eps)
        return *torch.autograd.grad(out, inputs, grads), None, None


def _normalise(x: Tensor, gate: Tensor, weight: Tensor, *, groups: int, eps: float) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    gated = (x.to(dtype) * F.silu(gate.to(dtype))).unflatten(1, (groups, -1))
    scale = (gated.square().mean(-1, keepdim=True) + eps).rsqrt()
    return ((gated * scale).flatten(1) * weight).to(x.dtype)
