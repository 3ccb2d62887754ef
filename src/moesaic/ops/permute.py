"""Groups: edges sorted by expert, so that each expert's rows are one contiguous segment.

Letters: N edges, E experts.

Carry rows from tokens to sorted edges and their weighted sum back to tokens, deterministically.

With K edges per token in token-major order the way back is a gather by the inverse permutation and
a sum over K: no atomics, the same bits each time. Other edge lists use ``index_add`` (deterministic
on a CPU; on a GPU only under ``torch.use_deterministic_algorithms``).

Letters: T tokens, K edges per token, N edges, D model dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from moesaic.core.shapes import Float, Int, Tensor


@dataclass(frozen=True, slots=True)
class RowGroups:
    """``order[j]`` is the edge at sorted place j, ``place`` its inverse: ``place[order[j]] == j``.

    ``counts[e]`` edges lead to expert e and ``ends`` is their running sum (int32, what
    ``grouped_mm`` wants). Edges that lead nowhere are sorted last, past ``ends[-1]``.
    """

    order: Int[Tensor, "N"]
    inverse: Int[Tensor, "N"]
    rows_per_expert: Int[Tensor, "E"]
    offsets: Int[Tensor, "E"]


def group_by_expert(expert: Int[Tensor, "N"], *, num_experts: int) -> RowGroups:
    """Sort edges by expert, stably; ``num_experts`` as an expert means dropped.

    N stays what it was (dropped edges keep a place), so nothing waits for the device.
    """
    by_expert, order = expert.sort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    # not bincount, which waits for a GPU to learn the largest value
    every = torch.arange(num_experts, device=expert.device, dtype=expert.dtype)
    ends = torch.searchsorted(by_expert, every, right=True)
    counts = ends.diff(prepend=ends.new_zeros(1))
    return RowGroups(order, place, counts, ends.to(torch.int32))


def reference_permute(
    x: Float[Tensor, "T D"], *, token: Int[Tensor, "N"], groups: RowGroups
) -> Float[Tensor, "N D"]:
    """The definition of ``spread``."""
    return x[token[groups.order]]


def reference_unpermute(
    y: Float[Tensor, "N D"],
    *,
    token: Int[Tensor, "N"],
    weight: Float[Tensor, "N"],
    groups: RowGroups,
    num_tokens: int,
) -> Float[Tensor, "T D"]:
    """The definition of ``combine``: sorted rows times edge weights, added to their tokens."""
    out = torch.zeros(num_tokens, y.shape[1], dtype=torch.float32, device=y.device)
    weighted = y.float() * weight[groups.order, None]
    return out.index_add(0, token[groups.order], weighted).to(y.dtype)


def permute(
    x: Float[Tensor, "T D"], *, token: Int[Tensor, "N"], groups: RowGroups, per_token: int
) -> Float[Tensor, "N D"]:
    """Copy each token's row to the sorted places of its edges.

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
    """Add sorted rows to their tokens, each times its edge's float32 weight, summed in float32."""
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
        ctx.way = _EdgeList(token, groups, x.shape[0], per_token)
        return x.index_select(0, _token_of_rows(ctx.way))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _sum_by_token(grads[0], ctx.way), None, None, None


class _Unpermute(torch.autograd.Function):
    """Keeps rows and weights; autograd's own ``index_add`` would keep the weighted rows as well."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, way: _EdgeList) -> Tensor:
        ctx.save_for_backward(y, weight)
        ctx.way = way
        return _sum_by_token(y, way, weight=weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, weight = ctx.saved_tensors
        groups = ctx.way.groups
        rows = grads[0].index_select(0, _token_of_rows(ctx.way)).float()
        dot = torch.linalg.vecdot(rows, y.float())  # router gradient: <d out[token], y>
        rows *= weight[groups.order, None]
        return rows.to(y.dtype), dot[groups.inverse].to(weight.dtype), None


def _sum_by_token(rows: Tensor, edges: _EdgeList, *, weight: Tensor | None = None) -> Tensor:
    """Sum of each token's rows, times their weights if there are any, in float32."""
    if not edges.per_token:
        weighted = rows.float() if weight is None else rows * weight[edges.groups.order, None]
        home = weighted.new_zeros(edges.num_tokens, rows.shape[1])
        return home.index_add_(0, _token_of_rows(edges), weighted).to(rows.dtype)
    if rows.device.type == "cpu" and rows.dtype == torch.float32:  # one pass over the rows
        bags = edges.groups.inverse.view(-1, edges.per_token)
        weights = None if weight is None else weight.float().view_as(bags)
        return F.embedding_bag(bags, rows, mode="sum", per_sample_weights=weights)
    home = rows.index_select(0, edges.groups.inverse)
    if weight is not None:
        home = home.float().mul_(weight[:, None])
    if edges.per_token > 1:
        home = home.view(-1, edges.per_token, rows.shape[1]).sum(1)
    return home.to(rows.dtype)


def _token_of_rows(edges: _EdgeList) -> Tensor:
    order = edges.groups.order
    if not edges.per_token:
        return edges.token[order]
    return order if edges.per_token == 1 else order // edges.per_token
