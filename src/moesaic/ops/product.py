"""Grouped product: each row times the matrix of its expert, differentiable in both.

Letters: R rows sorted by expert, E experts, D width in, F width out.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moesaic.core.shapes import Float, Tensor
from moesaic.ops.group import Groups
from moesaic.ops.grouped import Engine, segments


def plain_product(
    rows: Float[Tensor, "R D"], *, bank: Float[Tensor, "E D F"], groups: Groups
) -> Float[Tensor, "R F"]:
    """The definition: expert by expert, differentiated by autograd alone."""
    out = rows.new_zeros(rows.shape[0], bank.shape[-1])
    for expert, span in segments(groups):
        place = torch.arange(span.start, span.stop, device=out.device)
        out = out.index_copy(0, place, rows[span] @ bank[expert])
    return out


def grouped_product(
    rows: Float[Tensor, "R D"], *, bank: Float[Tensor, "E D F"], groups: Groups, engine: Engine
) -> Float[Tensor, "R F"]:
    """``rows @ bank[e]`` for the expert e of each row; zero past the segments.

    The bank takes the dtype of rows.
    """
    return _Product.apply(rows, bank.to(rows.dtype), groups, engine)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, bank: Tensor, groups: Groups, engine: Engine) -> Tensor:
        ctx.save_for_backward(rows, bank)
        ctx.groups, ctx.engine = groups, engine
        return engine.apply(rows, bank, groups=groups)

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
