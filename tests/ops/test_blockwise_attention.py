"""Blocks that are added up give what attention to all keys at once gives, gradients included."""

import math

import pytest
import torch

from moesaic.core.shapes import Tensor
from moesaic.nn.attention_backend import KeyValue
from moesaic.ops.blockwise_attention import (
    AttentionBackward,
    BlockScores,
    PartialAttention,
    attend_block,
    attend_block_backward,
    merge_block,
)
from ops.references import reference_attend

GROUPS, SHARED, QUERIES, WIDTH = 2, 3, 5, 4
ALL = BlockScores(WIDTH**-0.5)


def _inputs(keys: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(GROUPS, SHARED, QUERIES, WIDTH, generator=draw, dtype=torch.float64)
    key, value = torch.randn(2, GROUPS, keys, WIDTH, generator=draw, dtype=torch.float64)
    return query, key, value


def _plain(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    keys = KeyValue(key[None], value[None])
    out = reference_attend(query.flatten(0, 1)[None], keys, mask=None, causal=causal)
    return out[0].unflatten(-1, (GROUPS, SHARED, WIDTH)).permute(1, 2, 0, 3)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_blocks_in_any_order_add_up_to_attention(order: tuple[int, ...]) -> None:
    query, key, value = (x.requires_grad_() for x in _inputs(9))
    expected = _plain(query, key, value, causal=False)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [query, key, value], grad)

    blocks = [slice(0, 2), slice(2, 7), slice(7, 9)]
    found = PartialAttention(torch.zeros_like(query), torch.full_like(query[..., 0], -math.inf))
    got = [torch.zeros_like(x) for x in (query, key, value)]
    with torch.no_grad():
        for number in order:
            span = blocks[number]
            merge_block(found, attend_block(query, key[:, span], value[:, span], score=ALL))
        torch.testing.assert_close(found.out, expected)
        back = AttentionBackward(grad, (grad * found.out).sum(-1), found.lse)
        for span in blocks:
            part = attend_block_backward(
                query, key[:, span], value[:, span], backward=back, score=ALL
            )
            got[0] += part.query
            got[1][:, span] += part.key
            got[2][:, span] += part.value
    for one, other in zip(got[:3], wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_a_mask_hides_what_comes_later() -> None:
    query, key, value = (x.requires_grad_() for x in _inputs(QUERIES))
    expected = _plain(query, key, value, causal=True)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [query, key, value], grad)
    with torch.no_grad():
        score = BlockScores(WIDTH**-0.5, torch.ones(QUERIES, QUERIES, dtype=torch.bool).tril())
        found = attend_block(query, key, value, score=score)
        back = AttentionBackward(grad, (grad * found.out).sum(-1), found.lse)
        got = attend_block_backward(query, key, value, backward=back, score=score)
    torch.testing.assert_close(found.out, expected)
    for one, other in zip(got[:3], wanted, strict=True):
        torch.testing.assert_close(one, other)
