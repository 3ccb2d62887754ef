"""Grouped feed-forward: every expert applied to its own segment of rows, in a few large products.

The definition is four lines: ``reference_feed_forward``. The fast path is one autograd function that
keeps only its input and the pre-activation, and recomputes the activation going back. What
multiplies is an ``GroupedGEMM``; ``ops/kernel_selection.py`` picks one.

Letters: R rows sorted by expert, E experts, D model dim, F feed-forward dim, G what the activation
reads (F, or 2F if gated).

Grouped product: each row times the matrix of its expert, differentiable in both.

Letters: R rows sorted by expert, E experts, D width in, F width out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.ops.permute import RowGroups

ACTIVATION_CHUNK_ELEMENTS = 1 << 18  # values of a piece of the pre-activation: 1 MiB in float32


GATED_ACTIVATIONS = ("swiglu",)  # kernel names of activations that read twice the width they write


@runtime_checkable
class ActivationFunction(Protocol):
    """What happens between the two products: [R, G] -> [R, F].

    ``kernel`` is the name under which fused kernels know it (``relu``, ``relu2``, ``gelu``,
    ``swiglu``); with an empty one the composed path is taken.
    """

    kernel_name: ClassVar[str]

    def __call__(self, x: Tensor, /) -> Tensor: ...


@runtime_checkable
class GroupedGEMM(Protocol):
    """Products over segments. Rows past the last segment come out as zero."""

    name: str

    def matmul(
        self, rows: Float[Tensor, "R D"], weight: Float[Tensor, "E D F"], *, groups: RowGroups
    ) -> Float[Tensor, "R F"]:
        """Each row times the matrix of its expert. ``bank`` may be a transposed view."""
        ...

    def weight_gradient(
        self, left: Float[Tensor, "R D"], right: Float[Tensor, "R F"], *, groups: RowGroups
    ) -> Float[Tensor, "E D F"]:
        """``left[e].T @ right[e]`` of each segment: the gradient of a bank."""
        ...


@dataclass(frozen=True, slots=True)
class FeedForwardWeights:
    """The matrices of all experts; biases are both there or both None."""

    up: Float[Tensor, "E D G"]
    down: Float[Tensor, "E F D"]
    up_bias: Float[Tensor, "E G"] | None = None
    down_bias: Float[Tensor, "E D"] | None = None


def expert_slices(groups: RowGroups) -> Iterator[tuple[int, slice]]:
    """Yield ``(expert, rows)`` of the experts that have any. Waits for the device."""
    start = 0
    for expert, count in enumerate(groups.rows_per_expert.tolist()):
        if count:
            yield expert, slice(start, start + count)
        start += count


class SequentialGEMM:
    """One ``mm`` per expert, written straight into the result: the fastest on a CPU."""

    name = "segments"

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
    """``torch.nn.functional.grouped_mm``: one call for all experts, no wait for the device.

    Three traps are handled here and nowhere else: row strides must be multiples of 16 bytes, rows
    past ``ends[-1]`` come back uninitialised, and expanded (stride 0) inputs are refused.
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


class PaddedBMM:
    """Every segment padded to the longest, one ``bmm``: good only when experts are balanced."""

    name = "padded_bmm"

    def matmul(
        self, rows: Float[Tensor, "R D"], weight: Float[Tensor, "E D F"], *, groups: RowGroups
    ) -> Float[Tensor, "R F"]:
        slots, live = _slots(groups)
        padded = _into_slots(rows, slots=slots, groups=groups)
        out = rows.new_zeros(rows.shape[0], weight.shape[-1])
        out[:live] = torch.bmm(padded, weight).flatten(0, 1)[slots]
        return out

    def weight_gradient(
        self, left: Float[Tensor, "R D"], right: Float[Tensor, "R F"], *, groups: RowGroups
    ) -> Float[Tensor, "E D F"]:
        slots, _ = _slots(groups)
        a = _into_slots(left, slots=slots, groups=groups)
        return torch.bmm(a.transpose(1, 2), _into_slots(right, slots=slots, groups=groups))


def reference_feed_forward(
    rows: Float[Tensor, "R D"],
    *,
    weights: FeedForwardWeights,
    groups: RowGroups,
    activation: ActivationFunction,
) -> Float[Tensor, "R D"]:
    """The definition: expert by expert, differentiated by autograd alone."""
    out = torch.zeros_like(rows)
    for e, span in expert_slices(groups):
        hidden = rows[span] @ weights.up[e]
        hidden = hidden if weights.up_bias is None else hidden + weights.up_bias[e]
        result = activation(hidden) @ weights.down[e]
        result = result if weights.down_bias is None else result + weights.down_bias[e]
        place = torch.arange(span.start, span.stop, device=out.device)
        out = out.index_copy(0, place, result)
    return out


def grouped_feed_forward(
    rows: Float[Tensor, "R D"],
    *,
    weights: FeedForwardWeights,
    groups: RowGroups,
    activation: ActivationFunction,
    gemm: GroupedGEMM,
) -> Float[Tensor, "R D"]:
    """``activation(rows @ up[e]) @ down[e]`` for the expert e of each row; zero past the segments.

    Saves ``rows`` and the pre-activation for backward, nothing else. Banks take the dtype of rows.
    """
    up, down = weights.up.to(rows.dtype), weights.down.to(rows.dtype)
    biases = (weights.up_bias, weights.down_bias)
    return _GroupedFeedForward.apply(rows, up, down, *biases, groups, activation, gemm)


class _GroupedFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        rows, up, down, up_bias, down_bias, groups, activation, engine = inputs
        hidden = engine.matmul(rows, up, groups=groups)
        if up_bias is not None:
            hidden += up_bias.to(rows.dtype)[expert_of_row(groups, rows=rows.shape[0])]
        out = engine.matmul(_activation_forward(hidden, activation=activation), down, groups=groups)
        if down_bias is not None:
            out += down_bias.to(rows.dtype)[expert_of_row(groups, rows=rows.shape[0])]
            out = zero_rows_past_groups(out, offsets=groups.offsets)
        ctx.save_for_backward(rows, up, down, hidden)
        ctx.groups, ctx.activation, ctx.engine = groups, activation, engine
        ctx.bias = up_bias is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, up, down, hidden = ctx.saved_tensors
        groups, engine = ctx.groups, ctx.engine
        grad = grads[0].contiguous()
        grad_active = engine.matmul(grad, down.transpose(1, 2), groups=groups)
        active, grad_hidden = _activation_backward(hidden, grad_active, activation=ctx.activation)
        del grad_active
        grad_down = engine.weight_gradient(active, grad, groups=groups)
        del active
        grad_rows = None
        if ctx.needs_input_grad[0]:
            grad_rows = engine.matmul(grad_hidden, up.transpose(1, 2), groups=groups)
        grad_up = engine.weight_gradient(rows, grad_hidden, groups=groups)
        up_bias = _bias_gradient(grad_hidden, groups=groups) if ctx.bias else None
        down_bias = _bias_gradient(grad, groups=groups) if ctx.bias else None
        return grad_rows, grad_up, grad_down, up_bias, down_bias, None, None, None


def _activation_chunks(hidden: Tensor) -> Iterator[slice]:
    """Rows to activate at a time: on a CPU, so few that what lies between stays in the cache."""
    rows, width = hidden.shape
    step = (
        max(1, ACTIVATION_CHUNK_ELEMENTS // width) if hidden.device.type == "cpu" else max(1, rows)
    )
    for start in range(0, max(1, rows), step):  # one piece even without rows
        yield slice(start, start + step)


def _activation_forward(hidden: Tensor, *, activation: ActivationFunction) -> Tensor:
    first, *rest = _activation_chunks(hidden)
    if not rest:
        return activation(hidden)
    piece = activation(hidden[first])
    out = piece.new_empty(hidden.shape[0], piece.shape[1])
    out[first] = piece
    for span in rest:
        out[span] = activation(hidden[span])
    return out


def _activation_backward(
    hidden: Tensor, grad: Tensor, *, activation: ActivationFunction
) -> tuple[Tensor, Tensor]:
    """Return the activation again, and the gradient of ``hidden``."""
    grad_hidden, active = torch.empty_like(hidden), torch.empty_like(grad)
    for span in _activation_chunks(hidden):
        with torch.enable_grad():
            leaf = hidden[span].detach().requires_grad_()
            out = activation(leaf)
        (grad_hidden[span],) = torch.autograd.grad(out, leaf, grad[span])
        active[span] = out.detach()
    return active, grad_hidden


def expert_of_row(groups: RowGroups, *, rows: int) -> Int[Tensor, "R"]:
    """The expert of each sorted row; rows past the segments say the last expert."""
    place = torch.arange(rows, device=groups.offsets.device, dtype=groups.offsets.dtype)
    found = torch.searchsorted(groups.offsets, place, right=True)
    return found.clamp(max=groups.offsets.numel() - 1)


def _bias_gradient(grad: Tensor, *, groups: RowGroups) -> Tensor:
    expert = expert_of_row(groups, rows=grad.shape[0])
    live = torch.arange(grad.shape[0], device=grad.device) < groups.offsets[-1]
    out = torch.zeros(groups.offsets.numel(), grad.shape[1], device=grad.device)
    return out.index_add_(0, expert, torch.where(live[:, None], grad, 0.0).to(out.dtype))


def zero_rows_past_groups(rows: Tensor, *, offsets: Tensor) -> Tensor:
    """Return rows with those past the segments as zero."""
    live = torch.arange(rows.shape[0], device=rows.device) < offsets[-1]
    return torch.where(live[:, None], rows, 0.0)


def _slots(groups: RowGroups) -> tuple[Tensor, int]:
    """Where each live row sits in a padded [E * longest] buffer."""
    counts = groups.rows_per_expert.tolist()
    longest = max([1, *counts])
    spans = [torch.arange(count) + e * longest for e, count in enumerate(counts)]
    return torch.cat(spans).to(groups.rows_per_expert.device), sum(counts)


def _into_slots(rows: Tensor, *, slots: Tensor, groups: RowGroups) -> Tensor:
    experts = groups.rows_per_expert.numel()
    longest = max([1, *groups.rows_per_expert.tolist()])
    padded = rows.new_zeros(experts * longest, rows.shape[1])
    return padded.index_copy_(0, slots, rows[: slots.numel()]).view(experts, longest, -1)


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
    rows: Float[Tensor, "R D"],
    *,
    weight: Float[Tensor, "E D F"],
    groups: RowGroups,
    gemm: GroupedGEMM,
) -> Float[Tensor, "R F"]:
    """``rows @ bank[e]`` for the expert e of each row; zero past the segments.

    The bank takes the dtype of rows.
    """
    return _GroupedMatmul.apply(rows, weight.to(rows.dtype), groups, gemm)


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, bank: Tensor, groups: RowGroups, engine: GroupedGEMM
    ) -> Tensor:
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
            grad_rows = ctx.engine.matmul(grad, bank.transpose(1, 2), groups=ctx.groups)
        grad_bank = ctx.engine.weight_gradient(rows, grad, groups=ctx.groups)
        return grad_rows, grad_bank, None, None
