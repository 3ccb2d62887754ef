"""Collectives that differentiate: the backward of a movement is the movement back.

Rows move between the ranks of one group in blocks of any size, none at all included. Every rank of
the group calls the same functions in the same order. ``None`` and a group of one rank move nothing.
Sums over ranks are made in rank order and, below float32, in float32: the same bits every time.

Letters: R rows given, S rows returned, D what a row is (any shape).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as distributed
from torch.autograd.function import once_differentiable

from moesaic.core.shapes import Shaped, Tensor
from moesaic.distributed.flight_recorder import record_collective
from moesaic.distributed.process_groups import Group, group_rank, group_size

try:
    from torch.distributed import all_gather_single as _all_gather
except ImportError:  # before torch 2.13
    from torch.distributed import all_gather_into_tensor as _all_gather


def all_to_all(
    x: Shaped[Tensor, "R *D"],
    *,
    group: Group,
    input_splits: Sequence[int],
    output_splits: Sequence[int],
) -> Shaped[Tensor, "S *D"]:
    """Send ``sent[r]`` rows to rank r, in order, and receive ``received[r]`` rows from it."""
    if group_size(group) == 1:
        return x
    return _AllToAll.apply(x, group, tuple(input_splits), tuple(output_splits))


@dataclass(frozen=True, slots=True)
class AsyncRows:
    """Rows that are on their way."""

    rows: Tensor
    work: Any

    def wait(self) -> Shaped[Tensor, "S *D"]:
        """Return the rows when they are here; on a GPU its stream waits, not the host."""
        if self.work is not None:
            self.work.wait()
        return self.rows


def all_to_all_async(
    x: Shaped[Tensor, "R *D"],
    *,
    group: Group,
    input_splits: Sequence[int],
    output_splits: Sequence[int],
) -> AsyncRows:
    """Begin an ``all_to_all`` and return at once. Not differentiable; ``x`` must stay as it is."""
    if group_size(group) == 1:
        return AsyncRows(x, None)
    out = x.new_empty(sum(output_splits), *x.shape[1:])
    work = distributed.all_to_all_single(
        out, x.contiguous(), list(output_splits), list(input_splits), group=group, async_op=True
    )
    return AsyncRows(out, work)


def all_gather_rows(
    x: Shaped[Tensor, "R *D"], *, group: Group, sizes: Sequence[int]
) -> Shaped[Tensor, "S *D"]:
    """Return the rows of all ranks in rank order; rank r gives ``sizes[r]`` of them.

    A row's gradient is the sum over all ranks of what they found for it.
    """
    if group_size(group) == 1:
        return x
    return _AllGatherRows.apply(x, group, tuple(sizes))


def reduce_scatter_rows(
    x: Shaped[Tensor, "S *D"], *, group: Group, sizes: Sequence[int]
) -> Shaped[Tensor, "R *D"]:
    """Return the sum over ranks of this rank's block of rows; block r has ``sizes[r]`` rows."""
    if group_size(group) == 1:
        return x
    return _ReduceScatterRows.apply(x, group, tuple(sizes))


def reduce_from_group(x: Shaped[Tensor, "*D"], *, group: Group) -> Shaped[Tensor, "*D"]:
    """Return the sum over ranks of parts of one value. The gradient of a part is that of the sum,
    which every rank must hold alike.
    """
    return x if group_size(group) == 1 else _ReduceFromGroup.apply(x, group)


def copy_to_group(x: Shaped[Tensor, "*D"], *, group: Group) -> Shaped[Tensor, "*D"]:
    """Return a value that all ranks hold alike and each uses in part: its gradients are summed."""
    return x if group_size(group) == 1 else _CopyToGroup.apply(x, group)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: Group, sent: tuple[int, ...], received: tuple[int, ...]
    ) -> Tensor:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return _all_to_all(x, group=group, input_splits=sent, output_splits=received)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        way_back = _all_to_all(
            grads[0], group=ctx.group, input_splits=ctx.received, output_splits=ctx.sent
        )
        return way_back, None, None, None


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, sizes: tuple[int, ...]) -> Tensor:
        ctx.group, ctx.sizes = group, sizes
        return _all_gather_blocks(x, group=group, sizes=sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _reduce_scatter_blocks(grads[0], group=ctx.group, sizes=ctx.sizes), None, None


class _ReduceScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, sizes: tuple[int, ...]) -> Tensor:
        ctx.group, ctx.sizes = group, sizes
        return _reduce_scatter_blocks(x, group=group, sizes=sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _all_gather_blocks(grads[0], group=ctx.group, sizes=ctx.sizes), None, None


class _ReduceFromGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:  # noqa: ARG004
        return _all_reduce(x, group=group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: ARG004  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0], None


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _all_reduce(grads[0], group=ctx.group), None


def _all_to_all(
    x: Tensor, *, group: Group, input_splits: tuple[int, ...], output_splits: tuple[int, ...]
) -> Tensor:
    out = x.new_empty(sum(output_splits), *x.shape[1:])
    with record_collective("all_to_all", group=group):
        distributed.all_to_all_single(
            out, x.contiguous(), list(output_splits), list(input_splits), group=group
        )
    return out


def _all_gather_blocks(x: Tensor, *, group: Group, sizes: tuple[int, ...]) -> Tensor:
    ranks = len(sizes)
    if all(here == there for here, there in pairwise(sizes)):
        out = x.new_empty(sum(sizes), *x.shape[1:])
        with record_collective("all_gather", group=group):
            _all_gather(out, x.contiguous(), group=group)
        return out
    # gloo has no gather of unequal blocks; sending one's own to all costs the same bytes
    copies = x.repeat(ranks, *[1] * (x.dim() - 1))
    return _all_to_all(copies, group=group, input_splits=(x.shape[0],) * ranks, output_splits=sizes)


def _reduce_scatter_blocks(x: Tensor, *, group: Group, sizes: tuple[int, ...]) -> Tensor:
    """A reduce-scatter as an all-to-all and a sum here: the same bytes, any sizes, one order."""
    own = sizes[group_rank(group)]
    parts = _all_to_all(x, group=group, input_splits=sizes, output_splits=(own,) * len(sizes))
    parts = parts.view(len(sizes), own, *x.shape[1:])
    if not x.dtype.is_floating_point:
        return parts.sum(0, dtype=x.dtype)
    return parts.sum(0, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)


def _all_reduce(x: Tensor, *, group: Group) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    with record_collective("all_reduce", group=group):
        distributed.all_reduce(total, group=group)
    return total
