"""Grouped GEMM: every expert's matrix applied to its own group of rows, and the feed-forward of it.

The feed-forward is one autograd function that saves its input and the pre-activation only, and
recomputes the activation in backward. ``ops/kernel_selection.py`` selects the ``GroupedGEMM``.

Letters: R rows sorted by expert, E experts, D input width, F output or feed-forward width, G
pre-activation width (F, or 2F if gated), r rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.ops.chunk_sizes import chunk_sizes
from moesaic.ops.permute import RowGroups

GATED_ACTIVATIONS = (
    "swiglu",
)  # kernel names of activations whose input is twice as wide as their output

_OPERATORS = torch.library.Library("moesaic", "FRAGMENT")
_OPERATORS.define("grouped_products(Tensor[] tensors, int flops) -> ()")
_OPERATORS.impl("grouped_products", lambda *_: None, "CompositeExplicitAutograd")


@runtime_checkable
class ActivationFunction(Protocol):
    """The activation between the two matrix products: [R, G] -> [R, F].

    ``kernel_name`` selects the activation of fused kernels (``relu``, ``relu2``, ``gelu``,
    ``swiglu``); with an empty one the unfused kernel is used.
    """

    kernel_name: ClassVar[str]

    def __call__(self, x: Tensor, /) -> Tensor: ...


@runtime_checkable
class GroupedGEMM(Protocol):
    """Matrix products per expert. Output rows past the last group are zero."""

    name: str

    def matmul(
        self, rows: Float[Tensor, "R D"], weight: Float[Tensor, "E D F"], *, groups: RowGroups
    ) -> Float[Tensor, "R F"]:
        """Multiply each row by the matrix of its expert. ``weight`` may be a transposed view."""
        ...

    def weight_gradient(
        self, left: Float[Tensor, "R D"], right: Float[Tensor, "R F"], *, groups: RowGroups
    ) -> Float[Tensor, "E D F"]:
        """Return ``left[e].T @ right[e]`` for every expert."""
        ...


@dataclass(frozen=True, slots=True)
class FeedForwardWeights:
    """Stacked matrices of all experts; the biases are both given or both None."""

    up: Float[Tensor, "E D G"]
    down: Float[Tensor, "E F D"]
    up_bias: Float[Tensor, "E G"] | None = None
    down_bias: Float[Tensor, "E D"] | None = None


def expert_slices(groups: RowGroups) -> Iterator[tuple[int, slice]]:
    """Yield ``(expert, rows)`` of experts that have rows. Synchronizes with the device."""
    start = 0
    for expert, count in enumerate(groups.rows_per_expert.tolist()):
        if count:
            yield expert, slice(start, start + count)
        start += count


class SequentialGEMM:
    """One ``mm`` per expert, written into the result: the fastest on a CPU."""

    name = "sequential"

    def matmul(
        self, rows: Float[Tensor, "R D"], weight: Float[Tensor, "E D F"], *, groups: RowGroups
    ) -> Float[Tensor, "R F"]:
        out = rows.new_empty(rows.shape[0], weight.shape[-1])
        done = 0
        for expert, span in expert_slices(groups):
            torch.mm(rows[span], weight[expert], out=out[span])
            done = span.stop
        out[done:].zero_()
        return out

    def weight_gradient(
        self, left: Float[Tensor, "R D"], right: Float[Tensor, "R F"], *, groups: RowGroups
    ) -> Float[Tensor, "E D F"]:
        out = left.new_empty(groups.rows_per_expert.numel(), left.shape[-1], right.shape[-1])
        filled = set()
        for expert, span in expert_slices(groups):
            torch.mm(left[span].t(), right[span], out=out[expert])
            filled.add(expert)
        for expert in set(range(out.shape[0])) - filled:
            out[expert].zero_()
        return out


class GroupedMM:
    """``torch.nn.functional.grouped_mm``: one call for all experts, no device synchronization.

    Its limits are handled here only: row strides must be multiples of 16 bytes, rows past
    ``offsets[-1]`` are uninitialised, and expanded (stride 0) inputs raise.
    """

    name = "grouped_mm"

    def matmul(
        self, rows: Float[Tensor, "R D"], weight: Float[Tensor, "E D F"], *, groups: RowGroups
    ) -> Float[Tensor, "R F"]:
        out = F.grouped_mm(rows.contiguous(), weight, offs=groups.offsets)
        return zero_rows_past_groups(out, offsets=groups.offsets)

    def weight_gradient(
        self, left: Float[Tensor, "R D"], right: Float[Tensor, "R F"], *, groups: RowGroups
    ) -> Float[Tensor, "E D F"]:
        return F.grouped_mm(left.contiguous().t(), right.contiguous(), offs=groups.offsets)


class ShapesOnlyGEMM:
    """Stands in for ``GroupedMM`` on fake tensors, on any machine: it computes nothing."""

    name = "shapes only"

    def matmul(
        self, rows: Float[Tensor, "R D"], weight: Float[Tensor, "E D F"], *, groups: RowGroups
    ) -> Float[Tensor, "R F"]:
        out = rows.new_empty(rows.shape[0], weight.shape[-1])
        values = weight.shape[-2] * weight.shape[-1]
        report_products([rows, weight, out], flops=2 * int(groups.offsets[-1]) * values)
        return out

    def weight_gradient(
        self, left: Float[Tensor, "R D"], right: Float[Tensor, "R F"], *, groups: RowGroups
    ) -> Float[Tensor, "E D F"]:
        out = left.new_empty(groups.offsets.numel(), left.shape[-1], right.shape[-1])
        values = left.shape[-1] * right.shape[-1]
        report_products([left, right, out], flops=2 * int(groups.offsets[-1]) * values)
        return out


def report_products(tensors: list[Tensor], *, flops: int) -> None:
    """Make an operator of products that read and write ``tensors``, for modes that count them."""
    torch.ops.moesaic.grouped_products(tensors, flops)


def grouped_feed_forward(
    rows: Float[Tensor, "R D"],
    *,
    weights: FeedForwardWeights,
    groups: RowGroups,
    activation: ActivationFunction,
    gemm: GroupedGEMM,
) -> Float[Tensor, "R D"]:
    """``activation(rows @ up[e]) @ down[e]`` for the expert e of each row; zero past the groups.

    Saves only ``rows`` and the pre-activation for backward. Weights of another dtype than rows are
    cast, in backward again: no copy of them is saved.
    """
    biases = (weights.up_bias, weights.down_bias)
    given = (rows, weights.up, weights.down, *biases)
    return _GroupedFeedForward.apply(*given, groups, activation, gemm)


class _GroupedFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        rows, up, down, up_bias, down_bias, groups, activation, gemm = inputs
        hidden = gemm.matmul(rows, up.to(rows.dtype), groups=groups)
        add_expert_bias(hidden, up_bias, groups=groups)
        active = _activation_forward(hidden, activation=activation)
        out = gemm.matmul(active, down.to(rows.dtype), groups=groups)
        add_expert_bias(out, down_bias, groups=groups)
        if down_bias is not None:
            out = zero_rows_past_groups(out, offsets=groups.offsets)
        ctx.save_for_backward(rows, up, down, hidden)
        ctx.groups, ctx.activation, ctx.gemm = groups, activation, gemm
        ctx.bias = up_bias is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, up, down, hidden = ctx.saved_tensors
        groups, gemm = ctx.groups, ctx.gemm
        grad = grads[0].contiguous()
        grad_active = gemm.matmul(grad, down.to(rows.dtype).transpose(1, 2), groups=groups)
        active, grad_hidden = _activation_backward(hidden, grad_active, activation=ctx.activation)
        del grad_active
        grad_down = gemm.weight_gradient(active, grad, groups=groups).to(down.dtype)
        del active
        grad_rows = None
        if ctx.needs_input_grad[0]:
            transposed = up.to(rows.dtype).transpose(1, 2)
            grad_rows = gemm.matmul(grad_hidden, transposed, groups=groups)
        grad_up = gemm.weight_gradient(rows, grad_hidden, groups=groups).to(up.dtype)
        up_bias = _bias_gradient(grad_hidden, groups=groups) if ctx.bias else None
        down_bias = _bias_gradient(grad, groups=groups) if ctx.bias else None
        return grad_rows, grad_up, grad_down, up_bias, down_bias, None, None, None


def _activation_chunks(hidden: Tensor) -> Iterator[slice]:
    rows, width = hidden.shape
    step = max(1, chunk_sizes(hidden.device).activations // width)
    for start in range(0, max(1, rows), step):  # one chunk even without rows
        yield slice(start, start + step)


def _activation_forward(hidden: Tensor, *, activation: ActivationFunction) -> Tensor:
    first, *rest = _activation_chunks(hidden)
    if not rest:
        return activation(hidden)
    chunk = activation(hidden[first])
    out = chunk.new_empty(hidden.shape[0], chunk.shape[1])
    out[first] = chunk
    for span in rest:
        out[span] = activation(hidden[span])
    return out


def _activation_backward(
    hidden: Tensor, grad: Tensor, *, activation: ActivationFunction
) -> tuple[Tensor, Tensor]:
    """Recompute the activation; return it and the gradient of ``hidden``."""
    grad_hidden, active = torch.empty_like(hidden), torch.empty_like(grad)
    for span in _activation_chunks(hidden):
        with torch.enable_grad():
            leaf = hidden[span].detach().requires_grad_()
            out = activation(leaf)
        (grad_hidden[span],) = torch.autograd.grad(out, leaf, grad[span])
        active[span] = out.detach()
    return active, grad_hidden


def expert_of_row(groups: RowGroups, *, rows: int) -> Int[Tensor, "R"]:
    """Return the expert of each sorted row; the last expert for rows past the groups."""
    row = torch.arange(rows, device=groups.offsets.device, dtype=groups.offsets.dtype)
    found = torch.searchsorted(groups.offsets, row, right=True)
    return found.clamp(max=groups.offsets.numel() - 1)


def add_expert_bias(
    rows: Float[Tensor, "R F"], bias: Float[Tensor, "E F"] | None, *, groups: RowGroups
) -> None:
    """Add the bias of its expert to each row, in place; rows past the groups get the last one."""
    if bias is not None:
        rows += bias.to(rows.dtype)[expert_of_row(groups, rows=rows.shape[0])]


def _bias_gradient(grad: Tensor, *, groups: RowGroups) -> Tensor:
    expert = expert_of_row(groups, rows=grad.shape[0])
    live = torch.arange(grad.shape[0], device=grad.device) < groups.offsets[-1]
    out = torch.zeros(groups.offsets.numel(), grad.shape[1], device=grad.device)
    return out.index_add_(0, expert, torch.where(live[:, None], grad, 0.0).to(out.dtype))


def zero_rows_past_groups(rows: Tensor, *, offsets: Tensor) -> Tensor:
    """Return the rows with those past the last group set to zero."""
    live = torch.arange(rows.shape[0], device=rows.device) < offsets[-1]
    return torch.where(live[:, None], rows, 0.0)


def grouped_matmul(
    rows: Float[Tensor, "R D"],
    *,
    weight: Float[Tensor, "E D F"],
    groups: RowGroups,
    gemm: GroupedGEMM,
) -> Float[Tensor, "R F"]:
    """``rows @ weight[e]`` for the expert e of each row, differentiable; zero past the groups.

    The weight is cast to the dtype of rows, in backward again: no copy of it is saved.
    """
    return _GroupedMatmul.apply(rows, weight, groups, gemm)


def low_rank_product(
    rows: Float[Tensor, "R D"],
    *,
    a: Float[Tensor, "E D r"],
    b: Float[Tensor, "E r F"],
    scale: float,
    groups: RowGroups,
    gemm: GroupedGEMM,
) -> Float[Tensor, "R F"]:
    """``scale * rows @ a[e] @ b[e]`` for the expert e of each row, as ``grouped_matmul``."""
    low = grouped_matmul(rows, weight=a, groups=groups, gemm=gemm)
    return scale * grouped_matmul(low, weight=b, groups=groups, gemm=gemm)


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, groups: RowGroups, gemm: GroupedGEMM
    ) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.groups, ctx.gemm = groups, gemm
        return gemm.matmul(rows, weight.to(rows.dtype), groups=groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_rows = None
        if ctx.needs_input_grad[0]:
            transposed = weight.to(rows.dtype).transpose(1, 2)
            grad_rows = ctx.gemm.matmul(grad, transposed, groups=ctx.groups)
        grad_weight = None
        if ctx.needs_input_grad[1]:  # not of a frozen matrix
            grad_weight = ctx.gemm.weight_gradient(rows, grad, groups=ctx.groups).to(weight.dtype)
        return grad_rows, grad_weight, None, None
