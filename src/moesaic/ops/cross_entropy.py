"""Chunked cross-entropy over a large vocabulary: logits of a few hundred tokens exist at a time.

Gradients are computed in the forward pass, chunk by chunk: logits are neither saved nor recomputed.

Letters: N predicted tokens, V vocabulary, D model dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moesaic.core.shapes import Float, Int, Tensor

CHUNK_ELEMENTS = 1 << 21  # logits in memory at a time: 8 MiB in float32


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """``total``: sum over tokens of the training loss, in the autograd graph (float32 scalar).

    ``nll``: each token's negative log-likelihood without smoothing or z term, detached.
    """

    total: Float[Tensor, ""]
    nll: Float[Tensor, "N"]


def cross_entropy(
    hidden: Float[Tensor, "N D"],
    *,
    weight: Float[Tensor, "V D"],
    label: Int[Tensor, "N"],
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> TokenLoss:
    """Sum of token losses, with label smoothing (1512.00567) and a z-loss (2204.02311).

    Per token: ``(1-s) * nll + s * mean over V of -log p``, plus ``z * logsumexp^2``. Logits are
    ``hidden @ weight.T`` in the dtype of ``hidden``; the softmax is float32.
    """
    total, nll = _ChunkedCrossEntropy.apply(hidden, weight, label, label_smoothing, z_loss)
    return TokenLoss(total, nll)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        hidden, weight, label, smoothing, z = inputs
        table = weight.to(hidden.dtype)
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(table, dtype=torch.float32) if needs_grad else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        nll = torch.empty(label.shape[0], dtype=torch.float32, device=hidden.device)
        step = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], step):
            span = slice(start, start + step)
            logits = (hidden[span] @ table.t()).float()
            total += _chunk_loss(logits, label[span], nll[span], (smoothing, z))
            if grad_hidden is not None and grad_weight is not None:
                grad = _chunk_gradient(logits, label[span], nll[span], (smoothing, z))
                grad = grad.to(hidden.dtype)
                torch.mm(grad, table, out=grad_hidden[span])
                if grad.dtype == torch.float32:
                    grad_weight.addmm_(grad.t(), hidden[span])
                else:
                    grad_weight += grad.t() @ hidden[span]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(nll)
        return total, nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        weight = (grad_weight * scale).to(ctx.weight_dtype)
        return grad_hidden * scale.to(grad_hidden.dtype), weight, None, None, None


def _chunk_loss(logits: Tensor, label: Tensor, nll: Tensor, terms: tuple[float, float]) -> Tensor:
    """Fill ``nll`` and return the chunk's loss."""
    smoothing, z = terms
    lse = logits.logsumexp(-1)
    torch.sub(lse, logits.gather(1, label[:, None])[:, 0], out=nll)
    loss = (1 - smoothing) * nll.sum()
    if smoothing:
        loss = loss + smoothing * (lse - logits.mean(-1)).sum()
    return loss + z * lse.square().sum() if z else loss


def _chunk_gradient(
    logits: Tensor, label: Tensor, nll: Tensor, terms: tuple[float, float]
) -> Tensor:
    """Turn logits into the gradient of their loss, in place."""
    smoothing, z = terms
    at_label = logits.gather(1, label[:, None])
    lse = nll[:, None] + at_label
    grad = logits.sub_(lse).exp_()
    if z:
        grad.mul_(1 + 2 * z * lse)
    if smoothing:
        grad.sub_(smoothing / logits.shape[1])
    hit = torch.full_like(at_label, smoothing - 1)
    return grad.scatter_add_(1, label[:, None], hit)
