"""Blockwise attention: softmax attention to one block of keys at a time, merged exactly.

A partial result is stored with the log-sum-exp of its scores, so blocks can be merged in any order;
backward recomputes a block's weights from it (FlashAttention, 2205.14135, section 3.1).

Letters: n queries, m keys of a block, G key/value heads, R query heads of each, d head dim.
"""

from typing import NamedTuple

import torch

from moesaic.core.shapes import Float, Tensor


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
    """Contribution of one block to the gradients of query, key and value."""

    query: Float[Tensor, "G R n d"]
    key: Float[Tensor, "G m d"]
    value: Float[Tensor, "G m d"]


def attend_block(
    query: Float[Tensor, "G R n d"],
    key: Float[Tensor, "G m d"],
    value: Float[Tensor, "G m d"],
    *,
    diagonal: int | None,
) -> PartialAttention:
    """Attend to one block; query i attends to keys up to ``i + diagonal`` (None: all), at least
    one."""
    scores = _scores(query, key, diagonal=diagonal)
    lse = scores.logsumexp(-1)
    weight = scores.sub_(lse[..., None]).exp_()
    return PartialAttention((weight.flatten(1, 2) @ value).view_as(query), lse)


def merge_block(total: PartialAttention, block: PartialAttention) -> None:
    """Merge a block into ``total``, in place; the ``lse`` of an empty total is -inf."""
    lse = torch.logaddexp(total.lse, block.lse)
    before, new = (part.sub(lse).exp_()[..., None] for part in (total.lse, block.lse))
    total.out.mul_(before).addcmul_(block.out, new)
    total.lse.copy_(lse)


def attend_block_backward(
    query: Float[Tensor, "G R n d"],
    key: Float[Tensor, "G m d"],
    value: Float[Tensor, "G m d"],
    *,
    backward: AttentionBackward,
    diagonal: int | None,
) -> BlockGradients:
    """Return the gradients of ``attend_block``, given ``lse`` and ``delta`` over all blocks."""
    scores = _scores(query, key, diagonal=diagonal)
    weight = scores.sub_(backward.lse[..., None]).exp_().flatten(1, 2)
    grad, flat_query = backward.grad_out.flatten(1, 2), query.flatten(1, 2)
    grad_value = weight.transpose(1, 2) @ grad
    grad_score = (
        (grad @ value.transpose(1, 2)).sub_(backward.delta.flatten(1)[..., None]).mul_(weight)
    )
    grad_score.mul_(query.shape[-1] ** -0.5)
    return BlockGradients(
        (grad_score @ key).view_as(query), grad_score.transpose(1, 2) @ flat_query, grad_value
    )


def _scores(
    query: Float[Tensor, "G R n d"], key: Float[Tensor, "G m d"], *, diagonal: int | None
) -> Float[Tensor, "G R n m"]:
    groups, shared, n, width = query.shape
    scores = (query.flatten(1, 2) * width**-0.5) @ key.transpose(1, 2)
    scores = scores.view(groups, shared, n, key.shape[1])
    if diagonal is not None:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=key.device).tril_(diagonal)
        scores.masked_fill_(~visible, float("-inf"))
    return scores
