"""Carry rows from tokens to sorted edges and their weighted sum back to tokens, deterministically.

With K edges per token in token-major order the way back is a gather by the inverse permutation and
a sum over K: no atomics, the same bits each time. Other edge lists use ``index_add`` (deterministic
on a CPU; on a GPU only under ``torch.use_deterministic_algorithms``).

Letters: T tokens, K edges per token, N edges, D model dim.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.ops.group import Groups


def plain_spread(
    x: Float[Tensor, "T D"], *, token: Int[Tensor, "N"], groups: Groups
) -> Float[Tensor, "N D"]:
    """The definition of ``spread``."""
    return x[token[groups.order]]


def plain_combine(
    y: Float[Tensor, "N D"],
    *,
    token: Int[Tensor, "N"],
    weight: Float[Tensor, "N"],
    groups: Groups,
    num_tokens: int,
) -> Float[Tensor, "T D"]:
    """The definition of ``combine``: sorted rows times edge weights, added to their tokens."""
    out = torch.zeros(num_tokens, y.shape[1], dtype=torch.float32, device=y.device)
    weighted = y.float() * weight[groups.order, None]
    return out.index_add(0, token[groups.order], weighted).to(y.dtype)


def spread(
    x: Float[Tensor, "T D"], *, token: Int[Tensor, "N"], groups: Groups, per_token: int
) -> Float[Tensor, "N D"]:
    """Copy each token's row to the sorted places of its edges.

    ``per_token`` is K if edges are token-major with K per token, else 0.
    """
    if not per_token:
        return plain_spread(x, token=token, groups=groups)
    return _Spread.apply(x, groups, per_token)


def combine(
    y: Float[Tensor, "N D"],
    *,
    token: Int[Tensor, "N"],
    weight: Float[Tensor, "N"],
    groups: Groups,
    num_tokens: int,
    per_token: int,
) -> Float[Tensor, "T D"]:
    """Add sorted rows to their tokens, each times its edge's float32 weight, summed in float32."""
    if not per_token:
        return plain_combine(y, token=token, weight=weight, groups=groups, num_tokens=num_tokens)
    return _Combine.apply(y, weight, groups, per_token)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: Groups, per_token: int) -> Tensor:
        ctx.groups, ctx.per_token = groups, per_token
        return x.index_select(0, _token_of(groups, per_token=per_token))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _home(grads[0], ctx.groups.place, per_token=ctx.per_token), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, groups: Groups, per_token: int) -> Tensor:
        ctx.save_for_backward(y, weight)
        ctx.groups, ctx.per_token = groups, per_token
        return _home(y, groups.place, per_token=per_token, weight=weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, weight = ctx.saved_tensors
        groups = ctx.groups
        rows = grads[0].index_select(0, _token_of(groups, per_token=ctx.per_token)).float()
        dot = torch.linalg.vecdot(rows, y.float())  # router gradient: <d out[token], y>
        rows *= weight[groups.order, None]
        return rows.to(y.dtype), dot[groups.place].to(weight.dtype), None, None


def _home(rows: Tensor, place: Tensor, *, per_token: int, weight: Tensor | None = None) -> Tensor:
    """Sum of each token's rows, times their weights if there are any, in float32."""
    if rows.device.type == "cpu" and rows.dtype == torch.float32:  # one pass over the rows
        bags = place.view(-1, per_token)
        weights = None if weight is None else weight.float().view_as(bags)
        return F.embedding_bag(bags, rows, mode="sum", per_sample_weights=weights)
    home = rows.index_select(0, place)
    if weight is not None:
        home = home.float().mul_(weight[:, None])
    if per_token > 1:
        home = home.view(-1, per_token, rows.shape[1]).sum(1)
    return home.to(rows.dtype)


def _token_of(groups: Groups, *, per_token: int) -> Tensor:
    return groups.order if per_token == 1 else groups.order // per_token
