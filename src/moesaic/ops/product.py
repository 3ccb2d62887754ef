"""Grouped product: each row times the matrix of its expert, differentiable in both.

Letters: R rows sorted by expert, E experts, D width in, F width out.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moesaic.core.shapes import Float, Tensor
from moesaic.ops.group import RowGroups
from moesaic.ops.grouped import GroupedGEMM, expert_slices


def reference_grouped_matmul(
    rows: Float[Tensor, "R D"], *, weight: Float[Tensor, "E D F"], groups: RowGroups
) -> Float[Tensor, "R F"]:
    """The definition: expert by expert, differentiated by autograd alone."""
    out = rows.new_zeros(rows.shape[0], weight.shape[-1])
    for expert, span in expert_slices(groups):
        place = torch.arange(span.start, span.stop, device=out.device)
        out = out.index_copy(0, place, rows[span] @ weight[expert])
    return out


def grouped_matmul(
    rows: Float[Tensor, "R D"], *, weight: Float[Tensor, "E D F"], groups: RowGroups, gemm: GroupedGEMM
) -> Float[Tensor, "R F"]:
    """``rows @ bank[e]`` for the expert e of each row; zero past the segments.

    The bank takes the dtype of rows.
    """
    return _GroupedMatmul.apply(rows, weight.to(rows.dtype), groups, gemm)


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, bank: Tensor, groups: RowGroups, engine: GroupedGEMM) -> Tensor:
        ctx.save_for_backward(rows, bank)
        ctx.groups, ctx.engine = groups, engine
        return engine.matmul(rows, bank, groups=groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, bank = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_rows = None
        if ctx.needs_input_grad[0]:
            grad_rows = ctx.engine.apply(grad, bank.transpose(1, 2), groups=ctx.groups)
        grad_bank = ctx.engine.outer(rows, grad, groups=ctx.groups)
        return grad_rows, grad_bank, None, None
