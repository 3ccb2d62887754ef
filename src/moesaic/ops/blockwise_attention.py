"""Blockwise attention: softmax attention to one block of keys at a time, merged exactly.

A partial result is stored with the log-sum-exp of its scores, so blocks can be merged in any order;
backward recomputes a block's weights from it (FlashAttention, 2205.14135, section 3.1).

Letters: n queries, m keys of a block, G key/value heads, R query heads of each, d head dim.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from moesaic.core.shapes import Bool, Float, Tensor


class PartialAttention(NamedTuple):
    """Attention output over the keys so far, and the log-sum-exp of their scores."""

    out: Float[Tensor, "G R n d"]
    lse: Float[Tensor, "G R n"]


class AttentionBackward(NamedTuple):
    """Inputs of backward: output gradient, ``delta = sum(grad_out * out)`` and log-sum-exp."""

    grad_out: Float[Tensor, "G R n d"]
    delta: Float[Tensor, "G R n"]
    lse: Float[Tensor, "G R n"]


class BlockGradients(NamedTuple):
    """Contribution of one block to the gradients of query, key and value; that of its scores."""

    query: Float[Tensor, "G R n d"]
    key: Float[Tensor, "G m d"]
    value: Float[Tensor, "G m d"]
    score: Float[Tensor, "G R n m"]


@dataclass(frozen=True, slots=True)
class BlockScores:
    """Scores of a block: ``softcap tanh(scale q . k / softcap) + bias``, where ``visible``.

    Each query has at least one visible key; None: all, no bias, no soft cap.
    """

    scale: float
    visible: Bool[Tensor, "n m"] | None = None
    softcap: float | None = None
    bias: Float[Tensor, "G R n m"] | None = None

    def __call__(
        self, query: Float[Tensor, "G R n d"], key: Float[Tensor, "G m d"]
    ) -> Float[Tensor, "G R n m"]:
        """Return the scores, -inf where a key is not visible."""
        groups, shared, n, _ = query.shape
        scores = (query.flatten(1, 2) * self.scale) @ key.transpose(1, 2)
        scores = scores.view(groups, shared, n, key.shape[1])
        if self.softcap is not None:
            scores.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.bias is not None:
            scores.add_(self.bias)
        if self.visible is not None:
            scores.masked_fill_(~self.visible, float("-inf"))
        return scores

    def product_gradient(
        self, grad: Float[Tensor, "G R n m"], scores: Float[Tensor, "G R n m"]
    ) -> Float[Tensor, "G R n m"]:
        """Return the gradient of ``q . k``, given that of the scores."""
        if self.softcap is None:
            return grad * self.scale
        capped = scores if self.bias is None else scores - self.bias
        slope = 1 - (capped / self.softcap).square()
        return (grad * slope * self.scale).masked_fill(scores.isinf(), 0)


def attend_block(
    query: Float[Tensor, "G R n d"],
    key: Float[Tensor, "G m d"],
    value: Float[Tensor, "G m d"],
    *,
    score: BlockScores,
) -> PartialAttention:
    """Attend to one block of keys."""
    scores = score(query, key)
    lse = scores.logsumexp(-1)
    weight = scores.sub_(lse[..., None]).exp_()
    return PartialAttention((weight.flatten(1, 2) @ value).view_as(query), lse)


def merge_block(total: PartialAttention, block: PartialAttention) -> None:
    """Merge a block into ``total``, in place; the ``lse`` of an empty total is -inf."""
    lse = torch.logaddexp(total.lse, block.lse)
    before, new = (part.sub(lse).exp_()[..., None] for part in (total.lse, block.lse))
    total.out.mul_(before).addcmul_(block.out, new)
    total.lse.copy_(lse)


def merge_sinks(total: PartialAttention, sinks: Float[Tensor, "G R"]) -> None:
    """Merge one more key of each head, with this logit and without a value, in place."""
    lse = torch.logaddexp(total.lse, sinks[..., None])
    total.out.mul_((total.lse - lse).exp_()[..., None])
    total.lse.copy_(lse)


def sink_gradient(sinks: Float[Tensor, "G R"], backward: AttentionBackward) -> Float[Tensor, "G R"]:
    """Return the gradient of ``merge_sinks``, given ``lse`` and ``delta`` with the sinks."""
    weight = (sinks[..., None] - backward.lse).exp()
    return -(weight * backward.delta).sum(-1)


def attend_block_backward(
    query: Float[Tensor, "G R n d"],
    key: Float[Tensor, "G m d"],
    value: Float[Tensor, "G m d"],
    *,
    backward: AttentionBackward,
    score: BlockScores,
) -> BlockGradients:
    """Return the gradients of ``attend_block``, given ``lse`` and ``delta`` over all blocks."""
    scores = score(query, key)
    weight = (scores - backward.lse[..., None]).exp_().flatten(1, 2)
    grad, flat_query = backward.grad_out.flatten(1, 2), query.flatten(1, 2)
    grad_value = weight.transpose(1, 2) @ grad
    grad_score = (
        (grad @ value.transpose(1, 2)).sub_(backward.delta.flatten(1)[..., None]).mul_(weight)
    ).view_as(scores)
    product = score.product_gradient(grad_score, scores).flatten(1, 2)
    return BlockGradients(
        (product @ key).view_as(query), product.transpose(1, 2) @ flat_query, grad_value, grad_score
    )
