"""TritonMoEKernel: an MoE layer's experts in fused Triton kernels, with a hand-written backward.

Forward: one kernel gathers, multiplies and activates; one multiplies by the down projection; one
sums the rows of each token. Saved for backward: ``x``, the pre-activation [N, G] and the routing,
but neither gathered rows nor expert outputs, so memory depends on N * G and not on how fine-grained
the experts are (SonicMoE, arXiv:2512.14080). Reading rows by index inside the product follows
ScatterMoE (arXiv:2403.08245). No host synchronization and no atomic additions: results are
deterministic.

Letters: T tokens, N edges, D model dim, G pre-activation width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moesaic.core.shapes import Float, Tensor
from moesaic.ops.grouped_gemm import ActivationFunction, FeedForwardWeights
from moesaic.ops.kernel_check import compare_with_unfused
from moesaic.ops.moe_kernel import Edges
from moesaic.ops.triton import kernel_launch
from moesaic.ops.triton.kernel_launch import KernelOptions, LaunchContext
from moesaic.ops.triton.tiles import Tiles, gpu_architecture, tiles_for

TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
ACTIVATIONS = ("relu", "relu2", "gelu", "swiglu")
MIN_COLUMNS = 128


@dataclass(frozen=True, slots=True)
class TritonMoEKernel:
    """The fused ``MoEKernel`` for a GPU.

    The buffer of expert outputs has at most ``max_buffer_elements`` elements, or N * G; it is
    processed in chunks of columns if it would be larger. ``tiles`` replaces the table.
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
        inputs = (x, edges.weight, weights.up, weights.down, weights.up_bias, weights.down_bias)
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
        return _TritonMoE.apply(*inputs, job, self.max_buffer_elements, save)


def kernel_failure(device: torch.device, *, dtype: torch.dtype, activation: str) -> str:
    """Return what is wrong with the kernels, or "". Compiles them and waits for the device."""
    if dtype not in TOLERANCE or activation not in ACTIVATIONS:
        return f"there is no kernel for {dtype} and {activation!r}"
    return compare_with_unfused(
        TritonMoEKernel(),
        device=device,
        dtype=dtype,
        activation=activation,
        tolerance=TOLERANCE[dtype],
    )


def column_chunks(columns: int, *, rows: int, width: int, max_elements: int) -> Iterator[range]:
    """Split ``columns`` so that [rows, chunk] is at most [rows, width] or ``max_elements``."""
    most = max(MIN_COLUMNS, width // MIN_COLUMNS * MIN_COLUMNS)
    if rows * columns <= max_elements:
        most = max(1, columns)
    for first in range(0, columns, most):
        yield range(first, min(columns, first + most))


class _TritonMoE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, up, down, up_bias, down_bias, job, max_elements, save = inputs
        x, used_weight = x.contiguous(), weight.float().contiguous()
        used_up, used_down = up.to(x.dtype).contiguous(), down.to(x.dtype).contiguous()
        hidden, active = kernel_launch.up_projection(
            x, used_up, bias=_contiguous(up_bias), save_hidden=save, job=job
        )
        out = torch.empty_like(x)
        chunks = column_chunks(
            x.shape[1], rows=len(active), width=used_up.shape[2], max_elements=max_elements
        )
        for columns in chunks:
            rows = kernel_launch.row_matmul(
                active,
                used_down,
                bias=_contiguous(down_bias),
                transposed=False,
                columns=columns,
                job=job,
            )
            kernel_launch.launch_unpermute_sum(
                rows, weight=used_weight, out=out, first=columns.start, schedule=job.schedule
            )
            del rows  # before the next chunk is allocated
        if save:
            ctx.save_for_backward(x, used_weight, hidden, up, down, up_bias, down_bias)
            ctx.job, ctx.max_elements, ctx.weight_dtype = job, max_elements, weight.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, hidden, up, down, up_bias, down_bias = ctx.saved_tensors
        job, needs = ctx.job, ctx.needs_input_grad
        grad = grads[0].contiguous()
        used_down = down.to(x.dtype).contiguous()  # not saved: it may be a copy of all experts
        through = kernel_launch.down_backward(
            grad, used_down, bias=_contiguous(down_bias), weight=weight, hidden=hidden, job=job
        )
        grad_weight, grad_hidden = through.weight.to(ctx.weight_dtype), through.hidden
        grad_down = grad_up = grad_down_bias = grad_up_bias = grad_x = None
        if needs[3]:
            grad_down = kernel_launch.weight_gradient(
                through.scaled, grad, op="down_wgrad", like=down, job=job
            )
        del through  # as large as the activation
        if needs[2]:
            grad_up = kernel_launch.weight_gradient(x, grad_hidden, op="up_wgrad", like=up, job=job)
        if needs[4]:
            grad_up_bias = kernel_launch.bias_gradient(
                grad_hidden, weight=None, like=up_bias, schedule=job.schedule
            )
        if needs[5]:
            grad_down_bias = kernel_launch.bias_gradient(
                grad, weight=weight, like=down_bias, schedule=job.schedule
            )
        if needs[0]:
            used_up = up.to(x.dtype).contiguous()
            grad_x = _input_gradient(
                grad_hidden, up=used_up, like=x, job=job, max_elements=ctx.max_elements
            )
        return (
            *(grad_x, grad_weight, grad_up, grad_down, grad_up_bias, grad_down_bias),
            *(None, None, None),
        )


def _input_gradient(
    grad_hidden: Tensor, *, up: Tensor, like: Tensor, job: LaunchContext, max_elements: int
) -> Tensor:
    """Return the gradient of ``x`` from that of the pre-activation."""
    out = torch.empty_like(like)
    chunks = column_chunks(
        like.shape[1], rows=len(grad_hidden), width=up.shape[2], max_elements=max_elements
    )
    for columns in chunks:
        rows = kernel_launch.row_matmul(
            grad_hidden, up, bias=None, transposed=True, columns=columns, job=job
        )
        kernel_launch.launch_unpermute_sum(
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
