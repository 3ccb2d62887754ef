"""TritonMixer: the whole way of an MoE layer in a few kernels that read rows where they are.

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
from moesaic.ops.grouped import Activation, Banks
from moesaic.ops.mixture import Edges
from moesaic.ops.triton import launch
from moesaic.ops.triton.launch import Job, Way
from moesaic.ops.triton.tiles import Tiles, card_of, tiles_for

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEAST_COLUMNS = 128


@dataclass(frozen=True, slots=True)
class TritonMixer:
    """The fused ``Mixer``.

    Answers of experts stand in a buffer of at most ``spare`` elements, or of N * G, cut by columns
    if need be. ``tiles`` stands in for the table (for a tuner).
    """

    name: str = "triton"
    spare: int = 1 << 25
    tiles: Tiles | None = None

    def __call__(
        self, x: Float[Tensor, "T D"], *, edges: Edges, banks: Banks, activation: Activation
    ) -> Float[Tensor, "T D"]:
        shape = {"edges": edges.token.numel(), "experts": banks.up.shape[0]}
        tiles = self.tiles or tiles_for(**shape, dtype=x.dtype, card=card_of(x.device))
        job = Job(
            launch.plan(edges, rows=tiles["up"].rows),
            Way(tiles, activation.kernel, _precision(x)),
        )
        given = (x, edges.weight, banks.up, banks.down, banks.up_bias, banks.down_bias)
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
        return _Mixture.apply(*given, job, self.spare, keep)

    def kept(self, *, dim: int, width: int, bias: bool, live: float) -> float:
        """The pre-activation, the weight, and three indices of eight bytes."""
        del dim, bias, live  # places for edges that lead nowhere are kept
        return width + 1 + 3 * 2


def column_pieces(columns: int, *, rows: int, width: int, spare: int) -> Iterator[range]:
    """Cut ``columns`` so that a piece of ``rows`` rows is no larger than [rows, width] or spare."""
    most = max(LEAST_COLUMNS, width // LEAST_COLUMNS * LEAST_COLUMNS)
    if rows * columns <= spare:
        most = max(1, columns)
    for first in range(0, columns, most):
        yield range(first, min(columns, first + most))


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, up, down, up_bias, down_bias, job, spare, keep = inputs
        x, used_weight = x.contiguous(), weight.float().contiguous()
        used_up, used_down = up.to(x.dtype).contiguous(), down.to(x.dtype).contiguous()
        hidden, active = launch.up(x, used_up, bias=_flat(up_bias), keep=keep, job=job)
        out = torch.empty_like(x)
        width = used_up.shape[2]
        for columns in column_pieces(x.shape[1], rows=len(active), width=width, spare=spare):
            rows = launch.product(
                active, used_down, bias=_flat(down_bias), turned=False, columns=columns, job=job
            )
            launch.home(rows, weight=used_weight, out=out, first=columns.start, routes=job.routes)
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
        job, routes, needs = ctx.job, ctx.job.routes, ctx.needs_input_grad
        grad = grads[0].contiguous()
        bias = _flat(down_bias)
        through = launch.down_back(
            grad, used_down, bias=bias, weight=weight, hidden=hidden, job=job
        )
        to_weight, to_hidden = through.weight.to(ctx.weight_dtype), through.hidden
        to_down = to_up = to_down_bias = to_up_bias = to_x = None
        if needs[3]:
            to_down = launch.outer(through.scaled, grad, op="down_outer", like=down, job=job)
        del through  # of the size of the activation
        if needs[2]:
            to_up = launch.outer(x, to_hidden, op="up_outer", like=up, job=job)
        if needs[4]:
            to_up_bias = launch.sums(to_hidden, weight=None, like=up_bias, routes=routes)
        if needs[5]:
            to_down_bias = launch.sums(grad, weight=weight, like=down_bias, routes=routes)
        if needs[0]:
            to_x = _back_to_tokens(to_hidden, bank=used_up, like=x, job=job, spare=ctx.spare)
        return to_x, to_weight, to_up, to_down, to_up_bias, to_down_bias, None, None, None


def _back_to_tokens(hidden: Tensor, *, bank: Tensor, like: Tensor, job: Job, spare: int) -> Tensor:
    """Return the gradient of ``x`` from that of what the activation read."""
    out = torch.empty_like(like)
    pieces = column_pieces(like.shape[1], rows=len(hidden), width=bank.shape[2], spare=spare)
    for columns in pieces:
        rows = launch.product(hidden, bank, bias=None, turned=True, columns=columns, job=job)
        launch.home(rows, weight=None, out=out, first=columns.start, routes=job.routes)
        del rows
    return out


def _flat(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _precision(x: Tensor) -> str:
    """``tf32`` only where the user allowed it for torch's own products."""
    allowed = x.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"
