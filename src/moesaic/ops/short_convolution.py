"""Short causal convolution: each channel over its last few tokens, followed by SiLU.

The depthwise convolution in front of a state space model (Mamba, 2312.00752; Mamba-2, 2405.21060).

Letters: B rows, S length, C channels, W width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from moesaic.core.shapes import Float, Tensor


def short_convolution(
    x: Float[Tensor, "B S C"],
    *,
    earlier: Float[Tensor, "B V C"],
    weight: Float[Tensor, "C W"],
    bias: Float[Tensor, "C"],
) -> Float[Tensor, "B S C"]:
    """``silu(bias + sum_w weight[w] x[t - W + 1 + w])``; ``earlier`` are the W - 1 inputs before.

    Autograd saves the inputs only.
    """
    return _ShortConvolution.apply(x, earlier, weight, bias)


class _ShortConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        ctx.save_for_backward(*inputs)
        return F.silu(_convolve(*inputs)).to(inputs[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = F.silu(_convolve(*inputs)).to(inputs[0].dtype)
        return torch.autograd.grad(out, inputs, grads)


def _convolve(x: Tensor, earlier: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    width, length = weight.shape[1], x.shape[1]
    tokens = torch.cat([earlier.to(x.dtype), x], 1).to(weight.dtype)
    out = bias + tokens[:, width - 1 :] * weight[:, -1]
    for offset in range(width - 1):
        out = torch.addcmul(out, tokens[:, offset : offset + length], weight[:, offset])
    return out
