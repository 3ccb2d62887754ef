"""TritonMoEKernel: the whole way of an MoE layer in a few kernels that read rows where they are.

Forward gathers, multiplies and activates in one kernel; multiplies back; sums home. For backward it
keeps ``x`` and what the activation read, [N, G], and the routing: neither gathered rows nor answers
of experts, so memory depends on N * G alone and not on how fine the experts are (SonicMoE,
arXiv:2512.14080). Reading rows by index inside the product is ScatterMoE's idea (arXiv:2403.08245).
Nothing waits for the device and nothing is added atomically: the same bits each time.

Letters: T tokens, N edges, D model dim, G what the activation reads.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moesaic.core.shapes import Float, Tensor
from moesaic.ops.grouped_gemm import ActivationFunction, FeedForwardWeights
from moesaic.ops.moe_kernel import Edges
from moesaic.ops.triton import kernel_launch
from moesaic.ops.triton.kernel_launch import KernelOptions, LaunchContext
from moesaic.ops.triton.tiles import Tiles, gpu_architecture, tiles_for

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_COLUMNS = 128


@dataclass(frozen=True, slots=True)
class TritonMoEKernel:
    """The fused ``MoEKernel``.

    Answers of experts stand in a buffer of at most ``spare`` elements, or of N * G, cut by columns
    if need be. ``tiles`` stands in for the table (for a tuner).
    """

    name: str = "triton"
    max_buffer_elements: int = 1 << 25
    tiles: Tiles | None = None

    def __call__(
        self,
        x: Float[Tensor, "T D"],
        *,
        edges: Edges,
        weights: FeedForwardWeights,
        activation: ActivationFunction,
    ) -> Float[Tensor, "T D"]:
        shape = {"edges": edges.token.numel(), "experts": weights.up.shape[0]}
        tiles = self.tiles or tiles_for(
            **shape, dtype=x.dtype, architecture=gpu_architecture(x.device)
        )
        job = LaunchContext(
            kernel_launch.schedule_tiles(edges, rows=tiles["up"].block_m),
            KernelOptions(tiles, activation.kernel_name, _input_precision(x)),
        )
        given = (x, edges.weight, weights.up, weights.down, weights.up_bias, weights.down_bias)
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
        return _TritonMoE.apply(*given, job, self.max_buffer_elements, keep)

    def saved_activations(self, *, dim: int, width: int, bias: bool, live_share: float) -> float:
        """The pre-activation, the weight, and three indices of eight bytes."""
        del dim, bias, live_share  # places for edges that lead nowhere are kept
        return width + 1 + 3 * 2


def column_chunks(columns: int, *, rows: int, width: int, max_elements: int) -> Iterator[range]:
    """Cut ``columns`` so that a piece of ``rows`` rows is no larger than [rows, width] or spare."""
    most = max(MIN_COLUMNS, width // MIN_COLUMNS * MIN_COLUMNS)
    if rows * columns <= max_elements:
        most = max(1, columns)
    for first in range(0, columns, most):
        yield range(first, min(columns, first + most))


class _TritonMoE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, up, down, up_bias, down_bias, job, spare, keep = inputs
        x, used_weight = x.contiguous(), weight.float().contiguous()
        used_up, used_down = up.to(x.dtype).contiguous(), down.to(x.dtype).contiguous()
        hidden, active = kernel_launch.up_projection(
            x, used_up, bias=_contiguous(up_bias), save_hidden=keep, job=job
        )
        out = torch.empty_like(x)
        width = used_up.shape[2]
        for columns in column_chunks(x.shape[1], rows=len(active), width=width, max_elements=spare):
            rows = kernel_launch.row_matmul(
                active,
                used_down,
                bias=_contiguous(down_bias),
                transposed=False,
                columns=columns,
                job=job,
            )
            kernel_launch.unpermute_sum(
                rows, weight=used_weight, out=out, first=columns.start, schedule=job.schedule
            )
            del rows  # before the next piece is made
        if keep:
            ctx.save_for_backward(
                x, used_weight, used_up, used_down, hidden, up, down, up_bias, down_bias
            )
            ctx.job, ctx.spare, ctx.weight_dtype = job, spare, weight.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, used_up, used_down, hidden, up, down, up_bias, down_bias = ctx.saved_tensors
        job, routes, needs = ctx.job, ctx.job.schedule, ctx.needs_input_grad
        grad = grads[0].contiguous()
        bias = _contiguous(down_bias)
        through = kernel_launch.down_backward(
            grad, used_down, bias=bias, weight=weight, hidden=hidden, job=job
        )
        to_weight, to_hidden = through.weight.to(ctx.weight_dtype), through.hidden
        to_down = to_up = to_down_bias = to_up_bias = to_x = None
        if needs[3]:
            to_down = kernel_launch.weight_gradient(
                through.scaled, grad, op="down_outer", like=down, job=job
            )
        del through  # of the size of the activation
        if needs[2]:
            to_up = kernel_launch.weight_gradient(x, to_hidden, op="up_outer", like=up, job=job)
        if needs[4]:
            to_up_bias = kernel_launch.bias_gradient(
                to_hidden, weight=None, like=up_bias, schedule=routes
            )
        if needs[5]:
            to_down_bias = kernel_launch.bias_gradient(
                grad, weight=weight, like=down_bias, schedule=routes
            )
        if needs[0]:
            to_x = _input_gradient(
                to_hidden, expert_weight=used_up, like=x, job=job, spare=ctx.spare
            )
        return to_x, to_weight, to_up, to_down, to_up_bias, to_down_bias, None, None, None


def _input_gradient(
    hidden: Tensor, *, expert_weight: Tensor, like: Tensor, job: LaunchContext, spare: int
) -> Tensor:
    """Return the gradient of ``x`` from that of what the activation read."""
    out = torch.empty_like(like)
    pieces = column_chunks(
        like.shape[1], rows=len(hidden), width=expert_weight.shape[2], max_elements=spare
    )
    for columns in pieces:
        rows = kernel_launch.row_matmul(
            hidden, expert_weight, bias=None, transposed=True, columns=columns, job=job
        )
        kernel_launch.unpermute_sum(
            rows, weight=None, out=out, first=columns.start, schedule=job.schedule
        )
        del rows
    return out


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _input_precision(x: Tensor) -> str:
    """``tf32`` only where the user allowed it for torch's own products."""
    allowed = x.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"
