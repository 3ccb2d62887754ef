"""RMSNorm as one autograd function that saves its input and one number per row.

On a CPU ``torch.nn.functional.rms_norm`` is many small operations and saves three tensors of the
size of its input; on other devices it has a fused kernel and is used.

Letters: T tokens (or tokens and heads), D model dim.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from moesaic.core.shapes import Float, Tensor


def rms_norm(
    x: Float[Tensor, "*T D"], *, weight: Float[Tensor, "D"], eps: float
) -> Float[Tensor, "*T D"]:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension."""
    if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32:
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, scale = ctx.saved_tensors
        unit = x * scale
        grad_weight = (grads[0] * unit).flatten(0, -2).sum(0)
        inner = grads[0] * weight
        along = torch.linalg.vecdot(inner, unit)[..., None] / x.shape[-1]
        return inner.sub_(unit.mul_(along)).mul_(scale), grad_weight, None
