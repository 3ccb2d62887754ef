"""Launch each kernel on tensors: allocate the outputs and choose the grid, without a host sync.

Letters: T tokens, N edges, E experts, D model dim, F feed-forward dim, G pre-activation width (F,
or 2F if gated).
"""
# a kernel's sizes are constexpr inside it and plain numbers here
# pyright: reportArgumentType=false, reportCallIssue=false, reportMissingImports=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.ops.grouped_gemm import GATED_ACTIVATIONS
from moesaic.ops.moe_kernel import Edges
from moesaic.ops.triton import backward_kernels, forward_kernels
from moesaic.ops.triton.tiles import Tile, Tiles

SUM_WARPS = 4  # of ``bias_gradient_kernel``


@dataclass(frozen=True, slots=True)
class KernelOptions:
    """Tile of each matrix product, activation by name, and ``ieee`` or ``tf32`` for float32."""

    tiles: Tiles
    activation: str
    precision: str = "ieee"


@dataclass(frozen=True, slots=True)
class TileSchedule:
    """The edge list as kernels read it, and the expert and first row of each row tile.

    ``token`` is by sorted row, ``order`` and ``inverse`` as in ``RowGroups``. ``tile_expert`` and
    ``tile_row`` have the largest possible number of tiles; expert -1 marks an unused one. Without a
    fixed number of edges per token, those of token t are ``edge_of[starts[t]:starts[t + 1]]``.
    """

    token: Int[Tensor, "N"]
    order: Int[Tensor, "N"]
    inverse: Int[Tensor, "N"]
    offsets: Int[Tensor, "E"]
    tile_expert: Int[Tensor, "M"]
    tile_row: Int[Tensor, "M"]
    edge_of: Int[Tensor, "N"]
    starts: Int[Tensor, "S"]
    num_tokens: int
    per_token: int

    @property
    def num_tiles(self) -> int:
        return self.tile_expert.numel()


@dataclass(frozen=True, slots=True)
class LaunchContext:
    """Arguments of every launch: the tile schedule and the options."""

    schedule: TileSchedule
    options: KernelOptions


class DownBackward(NamedTuple):
    """Gradients through the down projection and the activation."""

    hidden: Tensor  # gradient of the pre-activation, [N, G]
    scaled: Tensor  # weight times active, [N, F]
    weight: Tensor  # gradient of the edge weights, [N]


def max_tiles(*, edges: int, experts: int, rows: int) -> int:
    """Return the most row tiles that ``edges`` rows of ``experts`` experts can have."""
    return (edges + min(edges, experts) * (rows - 1)) // rows


def schedule_tiles(edges: Edges, *, rows: int) -> TileSchedule:
    """Compute the schedule of row tiles of ``rows`` rows on the device."""
    groups = edges.groups
    number, experts = edges.token.numel(), groups.offsets.numel()
    capacity = max_tiles(edges=number, experts=experts, rows=rows)
    # two allocations: both aligned whatever the capacity, so that no length recompiles kernels
    tile_expert = torch.empty(capacity, dtype=torch.int32, device=edges.token.device)
    tile_row = torch.empty_like(tile_expert)
    forward_kernels.tile_schedule_kernel[(experts + 1,)](
        groups.offsets, tile_expert, tile_row, capacity,
        E=experts, EP=triton.next_power_of_2(experts), BM=rows, BLOCK=128, num_warps=1,
    )  # fmt: skip
    edge_of = starts = groups.order
    if not edges.per_token:
        by_token, edge_of = edges.token.sort(stable=True)
        every = torch.arange(edges.num_tokens + 1, device=by_token.device)
        starts = torch.searchsorted(by_token, every)
    return TileSchedule(
        token=edges.token.index_select(0, groups.order),
        order=groups.order,
        inverse=groups.inverse,
        offsets=groups.offsets,
        tile_expert=tile_expert,
        tile_row=tile_row,
        edge_of=edge_of,
        starts=starts,
        num_tokens=edges.num_tokens,
        per_token=edges.per_token,
    )


def up_projection(
    x: Float[Tensor, "T D"],
    expert_weight: Float[Tensor, "E D G"],
    *,
    bias: Float[Tensor, "E G"] | None,
    save_hidden: bool,
    job: LaunchContext,
) -> tuple[Float[Tensor, "N G"] | None, Float[Tensor, "N F"]]:
    """Return (pre-activation if ``save_hidden``, activation) by sorted row."""
    schedule, options, tile = job.schedule, job.options, job.options.tiles["up"]
    number, width = schedule.token.numel(), expert_weight.shape[2]
    hidden_dim = width // 2 if options.activation in GATED_ACTIVATIONS else width
    active = x.new_empty(number, hidden_dim)
    hidden = x.new_empty(number, width) if save_hidden else None
    operand, tma = _descriptor_or_pointer(
        expert_weight, tile=tile, block=(tile.block_k, tile.block_n)
    )
    grid = (schedule.num_tiles * triton.cdiv(hidden_dim, tile.block_n),)
    forward_kernels.up_projection_kernel[grid](
        x, operand, _or_unused(bias, x), schedule.token, _or_unused(hidden, active), active,
        schedule.tile_expert, schedule.tile_row, schedule.offsets, schedule.num_tiles,
        D=x.shape[1], F=hidden_dim, ACT=options.activation, SAVE_HIDDEN=save_hidden,
        BIAS=bias is not None, TMA=tma,
        PRECISION=options.precision, **_tile_constants(tile),
    )  # fmt: skip
    return hidden, active


def row_matmul(
    left: Float[Tensor, "N P"],
    expert_weight: Float[Tensor, "E P Q"],
    *,
    bias: Float[Tensor, "E Q"] | None,
    transposed: bool,
    columns: range,
    job: LaunchContext,
) -> Float[Tensor, "N C"]:
    """Return ``left @ expert_weight[e] + bias[e]`` by sorted row, for some columns.

    ``transposed`` multiplies by the transposed matrices: then ``expert_weight`` is [E, Q, P].
    """
    schedule, tile = job.schedule, job.options.tiles["up_dgrad" if transposed else "down"]
    sum_dim, total_columns = (
        (expert_weight.shape[2], expert_weight.shape[1]) if transposed else expert_weight.shape[1:]
    )
    out = left.new_empty(left.shape[0], len(columns))
    block = (tile.block_n, tile.block_k) if transposed else (tile.block_k, tile.block_n)
    operand, tma = _descriptor_or_pointer(expert_weight, tile=tile, block=block)
    grid = (schedule.num_tiles * triton.cdiv(len(columns), tile.block_n),)
    forward_kernels.row_matmul_kernel[grid](
        left, operand, _or_unused(bias, left), out, schedule.tile_expert, schedule.tile_row,
        schedule.offsets,
        schedule.num_tiles, columns.start, P=sum_dim, Q=total_columns, WIDTH=len(columns),
        TRANSPOSED=transposed,
        BIAS=bias is not None, TMA=tma, PRECISION=job.options.precision, **_tile_constants(tile),
    )  # fmt: skip
    return out


def launch_unpermute_sum(
    rows: Float[Tensor, "N C"],
    *,
    weight: Float[Tensor, "N"] | None,
    out: Float[Tensor, "T D"],
    first: int,
    schedule: TileSchedule,
) -> None:
    """Write each token's sum over its edges into columns [first, first + C) of ``out``."""
    width = rows.shape[1]
    block = min(1024, triton.next_power_of_2(width))  # eight numbers a thread: 16 bytes in half
    forward_kernels.unpermute_sum_kernel[(schedule.num_tokens, triton.cdiv(width, block))](
        rows, schedule.inverse, _or_unused(weight, rows), schedule.edge_of, schedule.starts,
        schedule.offsets, out,
        first, E=schedule.offsets.numel(), D=out.shape[1], WIDTH=width, K=schedule.per_token,
        BD=block,
        WEIGHTED=weight is not None, num_warps=max(1, block // 256),
    )  # fmt: skip


def down_backward(
    grad: Float[Tensor, "T D"],
    expert_weight: Float[Tensor, "E F D"],
    *,
    bias: Float[Tensor, "E D"] | None,
    weight: Float[Tensor, "N"],
    hidden: Float[Tensor, "N G"],
    job: LaunchContext,
) -> DownBackward:
    """Backpropagate the output gradient through the down projection and the activation."""
    schedule, options, tile = job.schedule, job.options, job.options.tiles["down_dgrad"]
    number, hidden_dim = hidden.shape[0], expert_weight.shape[1]
    column_tiles = triton.cdiv(hidden_dim, tile.block_n)
    scaled = hidden.new_empty(number, hidden_dim)
    grad_hidden = torch.empty_like(hidden)
    # zeros: no program visits a dropped edge
    dots = torch.zeros(column_tiles, number, dtype=torch.float32, device=grad.device)
    operand, tma = _descriptor_or_pointer(
        expert_weight, tile=tile, block=(tile.block_n, tile.block_k)
    )
    backward_kernels.down_backward_kernel[(schedule.num_tiles * column_tiles,)](
        grad, operand, _or_unused(bias, grad), schedule.token, schedule.order, weight, hidden,
        grad_hidden, scaled, dots, schedule.tile_expert, schedule.tile_row, schedule.offsets,
        schedule.num_tiles, number, D=grad.shape[1], F=hidden_dim, ACT=options.activation,
        BIAS=bias is not None, TMA=tma, PRECISION=options.precision, **_tile_constants(tile),
    )  # fmt: skip
    return DownBackward(grad_hidden, scaled, dots.sum(0) if column_tiles > 1 else dots[0])


def weight_gradient(
    left: Tensor, right: Tensor, *, op: str, like: Float[Tensor, "E P Q"], job: LaunchContext
) -> Float[Tensor, "E P Q"]:
    """Return ``left[e].T @ right[e]`` of every expert, in the dtype of ``like``.

    ``op`` is ``up_wgrad`` (left is by token) or ``down_wgrad`` (right is by token).
    """
    schedule, tile = job.schedule, job.options.tiles[op]
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    experts, p, q = like.shape
    grid = (experts * triton.cdiv(p, tile.block_m) * triton.cdiv(q, tile.block_n),)
    backward_kernels.weight_gradient_kernel[grid](
        left, right, schedule.token, schedule.offsets, out, P=p, Q=q, BP=tile.block_m,
        BQ=tile.block_n,
        BK=tile.block_k, GROUP=tile.group_m, GATHER_LEFT=op == "up_wgrad",
        GATHER_RIGHT=op == "down_wgrad", PRECISION=job.options.precision, num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def bias_gradient(
    rows: Tensor,
    *,
    weight: Float[Tensor, "N"] | None,
    like: Float[Tensor, "E C"],
    schedule: TileSchedule,
) -> Float[Tensor, "E C"]:
    """Return the sum of each expert's rows: the gradient of biases, in their dtype.

    With ``weight`` the rows are by token and each is multiplied by its edge weight.
    """
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    experts, width = like.shape
    block = min(128, triton.next_power_of_2(width))
    backward_kernels.bias_gradient_kernel[(experts, triton.cdiv(width, block))](
        rows, schedule.token, schedule.order, _or_unused(weight, rows), schedule.offsets, out,
        C=width, BR=32,
        BC=block, GATHER=weight is not None, WEIGHTED=weight is not None, num_warps=SUM_WARPS,
    )  # fmt: skip
    return out


def _tile_constants(tile: Tile) -> dict[str, int]:
    return {
        "BM": tile.block_m,
        "BN": tile.block_n,
        "BK": tile.block_k,
        "GROUP": tile.group_m,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _or_unused(tensor: Tensor | None, unused: Tensor) -> Tensor:
    """Return a valid pointer in place of an argument that the kernel does not read."""
    return unused if tensor is None else tensor


def _descriptor_or_pointer(
    expert_weight: Tensor, *, tile: Tile, block: tuple[int, int]
) -> tuple[Any, bool]:
    """Return (weight or tensor descriptor, whether it is one).

    Descriptors require rows of a multiple of 16 bytes.
    """
    fits = (
        expert_weight.shape[2] * expert_weight.element_size() % 16 == 0
        and expert_weight.data_ptr() % 16 == 0
    )
    if not (tile.tma and fits and expert_weight.numel()):
        return expert_weight, False
    return TensorDescriptor.from_tensor(expert_weight, [1, *block]), True
