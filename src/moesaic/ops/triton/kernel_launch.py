"""Launch each kernel on tensors: shapes, grids, the results' memory. No kernel waits for the host.

Letters: T tokens, N edges, E experts, D model dim, F feed-forward dim, G what the activation reads
(F, or 2F if gated).
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

SUM_WARPS = 4  # of the kernel that sums rows


@dataclass(frozen=True, slots=True)
class KernelOptions:
    """How to run: the tile of each product, the activation's name, ``ieee`` or ``tf32`` products.

    tf32 counts for float32 alone.
    """

    tiles: Tiles
    activation: str
    precision: str = "ieee"

    def pre_activation_width(self, hidden: int) -> int:
        """Return what the activation reads for a hidden width."""
        return 2 * hidden if self.activation in GATED_ACTIVATIONS else hidden


@dataclass(frozen=True, slots=True)
class TileSchedule:
    """Edges as kernels read them: sorted rows to tokens, the schedule of row tiles, the way home.

    ``token`` is by sorted row, ``order`` and ``place`` as in ``RowGroups``. ``tile_expert`` and
    ``tile_row`` have room for the most tiles there can be; expert -1 means none. Without a fixed
    number of edges per token, those of token t are ``edge_of[starts[t]:starts[t + 1]]``.
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
    """Which rows, and how to run: what every launch needs."""

    schedule: TileSchedule
    options: KernelOptions


class DownBackward(NamedTuple):
    """What comes back through the second product and the activation."""

    hidden: Tensor  # gradient of what the activation read, [N, G]
    scaled: Tensor  # weight times active, [N, F]
    weight: Tensor  # gradient of the edge weights, [N]


def max_tiles(*, edges: int, experts: int, rows: int) -> int:
    """Return the most row tiles that ``edges`` rows in ``experts`` segments can need."""
    return (edges + min(edges, experts) * (rows - 1)) // rows


def schedule_tiles(edges: Edges, *, rows: int) -> TileSchedule:
    """Return the routes for row tiles of ``rows``, made on the device."""
    groups = edges.groups
    number, experts = edges.token.numel(), groups.offsets.numel()
    room = max_tiles(edges=number, experts=experts, rows=rows)
    # two allocations: both aligned, whatever the room, so that no length compiles kernels anew
    tile_expert = torch.empty(room, dtype=torch.int32, device=edges.token.device)
    tile_row = torch.empty_like(tile_expert)
    forward_kernels.tile_schedule_kernel[(experts + 1,)](
        groups.offsets, tile_expert, tile_row, room,
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
    """Return (what the activation read, if it is to be kept; what it wrote) by sorted row."""
    routes, way, tile = job.schedule, job.options, job.options.tiles["up"]
    number, width = routes.token.numel(), expert_weight.shape[2]
    hidden_dim = width // 2 if way.activation in GATED_ACTIVATIONS else width
    active = x.new_empty(number, hidden_dim)
    hidden = x.new_empty(number, width) if save_hidden else None
    reader, tma = _descriptor_or_pointer(
        expert_weight, tile=tile, block=(tile.block_k, tile.block_n)
    )
    grid = (routes.num_tiles * triton.cdiv(hidden_dim, tile.block_n),)
    forward_kernels.up_projection_kernel[grid](
        x, reader, _or_unused(bias, x), routes.token, _or_unused(hidden, active), active,
        routes.tile_expert, routes.tile_row, routes.offsets, routes.num_tiles,
        D=x.shape[1], F=hidden_dim, ACT=way.activation, KEEP=save_hidden, BIAS=bias is not None, TMA=tma,
        PRECISION=way.precision, **_tile_constants(tile),
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
    """Return ``left @ bank[e] + bias[e]`` by sorted row, for some columns.

    ``turned`` multiplies by the transposed matrices: then the bank is [E, Q, P].
    """
    routes, tile = job.schedule, job.options.tiles["up_back" if transposed else "down"]
    sum_dim, whole = (
        (expert_weight.shape[2], expert_weight.shape[1]) if transposed else expert_weight.shape[1:]
    )
    out = left.new_empty(left.shape[0], len(columns))
    block = (tile.block_n, tile.block_k) if transposed else (tile.block_k, tile.block_n)
    reader, tma = _descriptor_or_pointer(expert_weight, tile=tile, block=block)
    grid = (routes.num_tiles * triton.cdiv(len(columns), tile.block_n),)
    forward_kernels.row_matmul_kernel[grid](
        left, reader, _or_unused(bias, left), out, routes.tile_expert, routes.tile_row, routes.offsets,
        routes.num_tiles, columns.start, P=sum_dim, Q=whole, WIDTH=len(columns), TURNED=transposed,
        BIAS=bias is not None, TMA=tma, PRECISION=job.options.precision, **_tile_constants(tile),
    )  # fmt: skip
    return out


def unpermute_sum(
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
        rows, schedule.inverse, _or_unused(weight, rows), schedule.edge_of, schedule.starts, schedule.offsets, out,
        first, E=schedule.offsets.numel(), D=out.shape[1], WIDTH=width, K=schedule.per_token, BD=block,
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
    """Bring the gradient of the output back through the second product and the activation."""
    routes, way, tile = job.schedule, job.options, job.options.tiles["down_back"]
    number, hidden_dim = hidden.shape[0], expert_weight.shape[1]
    column_tiles = triton.cdiv(hidden_dim, tile.block_n)
    scaled = hidden.new_empty(number, hidden_dim)
    grad_hidden = torch.empty_like(hidden)
    # zeros: no program visits a dropped edge
    dots = torch.zeros(column_tiles, number, dtype=torch.float32, device=grad.device)
    reader, tma = _descriptor_or_pointer(
        expert_weight, tile=tile, block=(tile.block_n, tile.block_k)
    )
    backward_kernels.down_backward_kernel[(routes.num_tiles * column_tiles,)](
        grad, reader, _or_unused(bias, grad), routes.token, routes.order, weight, hidden,
        grad_hidden, scaled, dots, routes.tile_expert, routes.tile_row, routes.offsets,
        routes.num_tiles, number, D=grad.shape[1], F=hidden_dim, ACT=way.activation,
        BIAS=bias is not None, TMA=tma, PRECISION=way.precision, **_tile_constants(tile),
    )  # fmt: skip
    return DownBackward(grad_hidden, scaled, dots.sum(0) if column_tiles > 1 else dots[0])


def weight_gradient(
    left: Tensor, right: Tensor, *, op: str, like: Float[Tensor, "E P Q"], job: LaunchContext
) -> Float[Tensor, "E P Q"]:
    """Return ``left[e].T @ right[e]`` of every segment: the gradient of a bank, in its dtype.

    ``op`` is ``up_outer`` (left is by token) or ``down_outer`` (right is by token).
    """
    routes, tile = job.schedule, job.options.tiles[op]
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    experts, p, q = like.shape
    grid = (experts * triton.cdiv(p, tile.block_m) * triton.cdiv(q, tile.block_n),)
    backward_kernels.weight_gradient_kernel[grid](
        left, right, routes.token, routes.offsets, out, P=p, Q=q, BP=tile.block_m, BQ=tile.block_n,
        BK=tile.block_k, GROUP=tile.group_m, GATHER_LEFT=op == "up_outer",
        GATHER_RIGHT=op == "down_outer", PRECISION=job.options.precision, num_warps=tile.num_warps,
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
    """Return the sum of each segment's rows: the gradient of biases, in their dtype.

    With ``weight`` the rows are by token and each counts as often as its edge weighs.
    """
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    experts, width = like.shape
    block = min(128, triton.next_power_of_2(width))
    backward_kernels.bias_gradient_kernel[(experts, triton.cdiv(width, block))](
        rows, schedule.token, schedule.order, _or_unused(weight, rows), schedule.offsets, out, C=width, BR=32,
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
    """Stand something in for a pointer that is not read."""
    return unused if tensor is None else tensor


def _descriptor_or_pointer(bank: Tensor, *, tile: Tile, block: tuple[int, int]) -> tuple[Any, bool]:
    """Return (bank or descriptor, whether it is one): descriptors want rows of whole 16 bytes."""
    fits = bank.shape[2] * bank.element_size() % 16 == 0 and bank.data_ptr() % 16 == 0
    if not (tile.tma and fits and bank.numel()):
        return bank, False
    return TensorDescriptor.from_tensor(bank, [1, *block]), True
