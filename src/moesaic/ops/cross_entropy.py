"""Chunked cross-entropy over a large vocabulary: the logits of some tokens exist at a time.

Gradients are computed in the forward pass, chunk by chunk, in the memory of the logits: these are
neither saved nor recomputed. Each chunk reads and writes the gradient of the whole table once, so
chunks are as large as a number of bytes allows (``chunk_sizes.py``). Of a table that is sharded by
rows over ranks, ``VocabularyShard`` adds up what the ranks have.

Letters: N predicted tokens, V vocabulary, v its rows on this rank, M tokens of a chunk, D model
dim.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.ops.autocast import as_autocast
from moesaic.ops.chunk_sizes import chunk_sizes


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """``total``: sum over tokens of the training loss, in the autograd graph (float32 scalar).

    ``nll``: each token's negative log-likelihood without smoothing or z term, detached.
    """

    total: Float[Tensor, ""]
    nll: Float[Tensor, "N"]


def _unchanged(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True, slots=True)
class VocabularyShard:
    """The rows of the table that a rank has: they start at ``first`` of ``size`` words.

    ``most`` is the largest number of rows of a rank: all take chunks of as many tokens.
    ``all_reduce_max`` and ``all_reduce_sum`` reduce [M] and [3, M] over the ranks of the table.
    ``own`` are the tokens whose loss is returned here; None: all.
    """

    first: int
    size: int
    most: int
    all_reduce_max: Callable[[Tensor], Tensor] = _unchanged
    all_reduce_sum: Callable[[Tensor], Tensor] = _unchanged
    own: slice | None = None


def cross_entropy(
    hidden: Float[Tensor, "N D"],
    *,
    weight: Float[Tensor, "v D"],
    label: Int[Tensor, "N"],
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    shard: VocabularyShard | None = None,
) -> TokenLoss:
    """Sum of token losses, with label smoothing (1512.00567) and a z-loss (2204.02311).

    Per token: ``(1-s) * nll + s * mean over V of -log p``, plus ``z * logsumexp^2``. Logits are
    ``hidden @ weight.T`` in the dtype of ``hidden`` (or of autocast); all else is float32.

    With a ``shard`` every rank passes the tokens of all ranks, and its loss must reach ``backward``
    with the same factor on each: a rank's loss is its share (``moe/batch_group.py``), and each has
    gradients of other ranks' tokens.
    """
    words = weight.shape[0]
    shard = shard or VocabularyShard(0, words, words)
    terms = (shard, label_smoothing, z_loss)
    total, nll = _ChunkedCrossEntropy.apply(as_autocast(hidden), weight, label, terms)
    return TokenLoss(total, nll)


def tokens_per_chunk(words: int, *, dtype: torch.dtype, device: torch.device) -> int:
    """Return how many tokens' logits of ``dtype`` exist at a time."""
    return max(1, chunk_sizes(device).logits // max(1, words * dtype.itemsize))


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        hidden, weight, label, terms = inputs
        table, (own, count) = weight.to(hidden.dtype), (terms[0].own, label.shape[0])
        for_hidden, for_weight, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        grad_weight = torch.zeros_like(table, dtype=torch.float32) if for_weight else None
        losses, nll = torch.empty(2, count, dtype=torch.float32, device=hidden.device)
        step = tokens_per_chunk(terms[0].most, dtype=hidden.dtype, device=hidden.device)
        memory = hidden.new_empty(min(step, count), table.shape[0])
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, count, step):
                span = slice(start, min(start + step, count))
                logits = memory[: span.stop - start]
                torch.mm(hidden[span], table.t(), out=logits)
                save = for_hidden or for_weight
                losses[span], nll[span] = _score(logits, label[span], terms, save=save)
                if grad_hidden is not None:
                    torch.mm(logits, table, out=grad_hidden[span])
                if grad_weight is not None:
                    _add_product(grad_weight, logits.t(), hidden[span])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        if own is not None:
            losses, nll = losses[own], nll[own].clone()
        ctx.mark_non_differentiable(nll)
        return losses.sum(), nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_hidden, grad_weight), scale = ctx.saved_tensors, grads[0]
        if grad_hidden is not None:
            grad_hidden = grad_hidden * scale.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * scale).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None


def _score(
    logits: Float[Tensor, "M v"], label: Int[Tensor, "M"], terms: Any, *, save: bool
) -> tuple[Tensor, Tensor]:
    """Return losses and negative log-likelihoods [M]; ``save``: turn logits into gradients."""
    shard, smoothing, z = terms
    slices = list(_slices(logits))
    row = label - shard.first
    local = (row >= 0) & (row < logits.shape[1])
    row = row.where(local, 0)[:, None]
    maximum = shard.all_reduce_max(logits.amax(1).float())
    sums = torch.cat([_sums(logits[s], maximum[s], bool(smoothing)) for s in slices], 1)
    sums[1] = logits.gather(1, row)[:, 0] * local
    power, at_label, logit_sum = shard.all_reduce_sum(sums)
    lse = power.log_().add_(maximum)
    nll = lse - at_label
    loss = (1 - smoothing) * nll if smoothing else nll
    if smoothing:
        loss = loss + smoothing * (lse - logit_sum / shard.size)
    if z:
        loss = loss + z * lse.square()
    if save:
        hit = (smoothing - 1) * local[:, None].float()
        for s in slices:
            grad = logits[s].float().sub_(lse[s, None]).exp_()  # the same memory in float32
            if z:
                grad.mul_((1 + 2 * z * lse[s])[:, None])
            if smoothing:
                grad.sub_(smoothing / shard.size)
            grad.scatter_add_(1, row[s], hit[s])
            if logits.dtype != torch.float32:
                logits[s] = grad
    return loss, nll


def _slices(logits: Float[Tensor, "M v"]) -> Iterator[slice]:
    step = max(1, chunk_sizes(logits.device).float32 // (4 * max(1, logits.shape[1])))
    return (slice(start, start + step) for start in range(0, max(1, len(logits)), step))


def _sums(logits: Float[Tensor, "M v"], maximum: Tensor, logit_sum: bool) -> Float[Tensor, "3 M"]:  # noqa: FBT001
    """Return the sums of powers, a place for the label's logit, and the sums of logits."""
    values = logits.float()
    sums = values.new_zeros(3, len(values))
    if logit_sum:
        torch.sum(values, 1, out=sums[2])
    torch.sum((values - maximum[:, None]).exp_(), 1, out=sums[0])
    return sums


def _add_product(total: Float[Tensor, "v D"], left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to a float32 tensor, by one product where the device can."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif _adds_in_float32(left.device.type, left.dtype):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += left @ right


@cache
def _adds_in_float32(device: str, dtype: torch.dtype) -> bool:
    """Whether a product of narrow matrices can be added to a float32 one: tried on a small one."""
    if device in ("cpu", "meta"):
        return False
    left, total = torch.ones(16, 16, device=device, dtype=dtype), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, left, left, out_dtype=torch.float32, out=total)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return bool((total == 17).all())
