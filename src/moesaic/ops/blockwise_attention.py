"""Blockwise: attention to one block of keys at a time, added up as if it had been all at once.

What queries found is kept with the logarithm of its denominator, so blocks may be added in any
order; backward makes a block's weights again from that logarithm (FlashAttention, 2205.14135,
section 3.1). ``nn/looking.reference_attend`` is the definition.

Letters: n queries, m keys of a block, G key/value heads, R query heads of each, d head dim.
"""

from typing import NamedTuple

import torch

from moesaic.core.shapes import Float, Tensor


class PartialAttention(NamedTuple):
    """A weighted mean of values, and the logarithm of the sum of its weights."""

    out: Float[Tensor, "G R n d"]
    lse: Float[Tensor, "G R n"]


class AttentionBackward(NamedTuple):
    """What backward knows of some queries.

    The gradient of what they found, its product with what they found, and ``Found.log``.
    """

    grad_out: Float[Tensor, "G R n d"]
    delta: Float[Tensor, "G R n"]
    lse: Float[Tensor, "G R n"]


class BlockGradients(NamedTuple):
    """What one block gives to the gradients of its queries, keys and values."""

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
    """Look at one block; query i sees the keys up to ``i + diagonal`` (None: all), at least one."""
    scores = _scores(query, key, diagonal=diagonal)
    log = scores.logsumexp(-1)
    weight = scores.sub_(log[..., None]).exp_()
    return PartialAttention((weight.flatten(1, 2) @ value).view_as(query), log)


def merge_block(total: PartialAttention, block: PartialAttention) -> None:
    """Add what another block gave to what was found before (nothing: ``log`` is -inf), in place."""
    log = torch.logaddexp(total.lse, block.lse)
    before, new = (part.sub(log).exp_()[..., None] for part in (total.lse, block.lse))
    total.out.mul_(before).addcmul_(block.out, new)
    total.lse.copy_(log)


def attend_block_backward(
    query: Float[Tensor, "G R n d"],
    key: Float[Tensor, "G m d"],
    value: Float[Tensor, "G m d"],
    *,
    backward: AttentionBackward,
    diagonal: int | None,
) -> BlockGradients:
    """Return what ``attend_block`` of this block gives, once all blocks have been added."""
    scores = _scores(query, key, diagonal=diagonal)
    weight = scores.sub_(backward.lse[..., None]).exp_().flatten(1, 2)
    grad, asked = backward.grad_out.flatten(1, 2), query.flatten(1, 2)
    of_value = weight.transpose(1, 2) @ grad
    of_score = (
        (grad @ value.transpose(1, 2)).sub_(backward.delta.flatten(1)[..., None]).mul_(weight)
    )
    of_score.mul_(query.shape[-1] ** -0.5)
    return BlockGradients(
        (of_score @ key).view_as(query), of_score.transpose(1, 2) @ asked, of_value
    )


def _scores(
    query: Float[Tensor, "G R n d"], key: Float[Tensor, "G m d"], *, diagonal: int | None
) -> Float[Tensor, "G R n m"]:
    groups, shared, n, width = query.shape
    scores = (query.flatten(1, 2) * width**-0.5) @ key.transpose(1, 2)
    scores = scores.view(groups, shared, n, key.shape[1])
    if diagonal is not None:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=key.device).tril_(diagonal)
        scores.masked_fill_(~seen, float("-inf"))
    return scores
