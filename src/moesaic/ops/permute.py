"""Permute token rows into expert order, and unpermute: the weighted sum back to tokens.

With K edges per token in token-major order, unpermute is a gather by the inverse permutation and a
sum over K: no atomics, so it is deterministic. Other edge lists use ``index_add`` (deterministic on
a CPU; on a GPU only under ``torch.use_deterministic_algorithms``).

Letters: T tokens, K edges per token, N edges, E experts, D model dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from moesaic.core.shapes import Float, Int, Tensor


@dataclass(frozen=True, slots=True)
class RowGroups:
    """Edges sorted by expert, so that each expert's rows are one contiguous group.

    ``order[j]`` is the edge at sorted row j; ``inverse[order[j]] == j``. ``offsets`` is the running
    sum of ``rows_per_expert`` (int32, as ``grouped_mm`` requires). Dropped edges are sorted last,
    past ``offsets[-1]``.
    """

    order: Int[Tensor, "N"]
    inverse: Int[Tensor, "N"]
    rows_per_expert: Int[Tensor, "E"]
    offsets: Int[Tensor, "E"]


def group_by_expert(expert: Int[Tensor, "N"], *, num_experts: int) -> RowGroups:
    """Sort edges by expert, stably; the expert ``num_experts`` means dropped.

    Dropped edges keep a row, so N is known without a device synchronization.
    """
    by_expert, order = expert.sort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    # not bincount, which synchronizes with the GPU to get the largest value
    every = torch.arange(num_experts, device=expert.device, dtype=expert.dtype)
    offsets = torch.searchsorted(by_expert, every, right=True)
    counts = offsets.diff(prepend=offsets.new_zeros(1))
    return RowGroups(order, inverse, counts, offsets.to(torch.int32))


def permute(
    x: Float[Tensor, "T D"], *, token: Int[Tensor, "N"], groups: RowGroups, per_token: int
) -> Float[Tensor, "N D"]:
    """Copy each token's row to the sorted rows of its edges.

    ``per_token`` is K if edges are token-major with K per token, else 0.
    """
    return _Permute.apply(x, token, groups, per_token)


def unpermute(
    y: Float[Tensor, "N D"],
    *,
    token: Int[Tensor, "N"],
    weight: Float[Tensor, "N"],
    groups: RowGroups,
    num_tokens: int,
    per_token: int,
) -> Float[Tensor, "T D"]:
    """Sum each token's sorted rows, each times its edge's float32 weight, in float32."""
    return _Unpermute.apply(y, weight, _EdgeList(token, groups, num_tokens, per_token))


@dataclass(frozen=True, slots=True)
class _EdgeList:
    token: Int[Tensor, "N"]
    groups: RowGroups
    num_tokens: int
    per_token: int


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, groups: RowGroups, per_token: int) -> Tensor:
        ctx.edges = _EdgeList(token, groups, x.shape[0], per_token)
        return x.index_select(0, _token_of_rows(ctx.edges))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _sum_by_token(grads[0], ctx.edges), None, None, None


class _Unpermute(torch.autograd.Function):
    """Saves rows and weights; autograd's own ``index_add`` would save the weighted rows as well."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, edges: _EdgeList) -> Tensor:
        ctx.save_for_backward(y, weight)
        ctx.edges = edges
        return _sum_by_token(y, edges, weight=weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, weight = ctx.saved_tensors
        groups = ctx.edges.groups
        rows = grads[0].index_select(0, _token_of_rows(ctx.edges)).float()
        dot = torch.linalg.vecdot(rows, y.float())  # router gradient: <d out[token], y>
        rows *= weight[groups.order, None]
        return rows.to(y.dtype), dot[groups.inverse].to(weight.dtype), None


def _sum_by_token(rows: Tensor, edges: _EdgeList, *, weight: Tensor | None = None) -> Tensor:
    """Sum each token's rows, times their weights if given, in float32."""
    if not edges.per_token:
        weighted = rows.float() if weight is None else rows * weight[edges.groups.order, None]
        out = weighted.new_zeros(edges.num_tokens, rows.shape[1])
        return out.index_add_(0, _token_of_rows(edges), weighted).to(rows.dtype)
    if rows.device.type == "cpu" and rows.dtype == torch.float32:  # one pass over the rows
        bags = edges.groups.inverse.view(-1, edges.per_token)
        weights = None if weight is None else weight.float().view_as(bags)
        return F.embedding_bag(bags, rows, mode="sum", per_sample_weights=weights)
    out = rows.index_select(0, edges.groups.inverse)
    if weight is not None:
        out = out.float().mul_(weight[:, None])
    if edges.per_token > 1:
        out = out.view(-1, edges.per_token, rows.shape[1]).sum(1)
    return out.to(rows.dtype)


def _token_of_rows(edges: _EdgeList) -> Tensor:
    order = edges.groups.order
    if not edges.per_token:
        return edges.token[order]
    return order if edges.per_token == 1 else order // edges.per_token
