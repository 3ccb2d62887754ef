"""Differentiable collectives: the backward pass of each one is its dual collective.

Rows move between the ranks of one group in blocks of any size, zero included. Every rank of the
group calls the same functions in the same order. ``None`` and a group of one rank move nothing.
Sums over ranks are made in rank order and, below float32, in float32: the same bits every time.

Letters: R rows given, S rows returned, D the shape of a row (any).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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

_Function = Callable[[Tensor], Tensor]


def all_to_all(
    x: Shaped[Tensor, "R *D"],
    *,
    group: Group,
    input_splits: Sequence[int],
    output_splits: Sequence[int],
) -> Shaped[Tensor, "S *D"]:
    """Send ``input_splits[r]`` rows to rank r, in order; receive ``output_splits[r]`` from it."""
    if group_size(group) == 1:
        return x
    sizes, received = tuple(input_splits), tuple(output_splits)
    return _Collective.apply(
        x,
        partial(_all_to_all, group=group, input_splits=sizes, output_splits=received),
        partial(_all_to_all, group=group, input_splits=received, output_splits=sizes),
    )


@dataclass(frozen=True, slots=True)
class AsyncRows:
    """The rows of an all-to-all that may still be in progress."""

    rows: Tensor
    work: Any

    def wait(self) -> Shaped[Tensor, "S *D"]:
        """Return the rows once received; on a GPU its stream waits, not the host."""
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
    """Start an ``all_to_all`` and return at once. Not differentiable; ``x`` must not change."""
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

    The gradient of a row is the sum over all ranks (a reduce-scatter).
    """
    if group_size(group) == 1:
        return x
    gather = partial(_all_gather_blocks, group=group, sizes=tuple(sizes))
    return _Collective.apply(x, gather, partial(_reduce_scatter_blocks, **gather.keywords))


def reduce_scatter_rows(
    x: Shaped[Tensor, "S *D"], *, group: Group, sizes: Sequence[int]
) -> Shaped[Tensor, "R *D"]:
    """Return the sum over ranks of this rank's block of rows; block r has ``sizes[r]`` rows."""
    if group_size(group) == 1:
        return x
    scatter = partial(_reduce_scatter_blocks, group=group, sizes=tuple(sizes))
    return _Collective.apply(x, scatter, partial(_all_gather_blocks, **scatter.keywords))


def reduce_from_group(x: Shaped[Tensor, "*D"], *, group: Group) -> Shaped[Tensor, "*D"]:
    """Return the sum over ranks of partial values (an all-reduce).

    The gradient of each part is the gradient of the sum, which must be the same on every rank.
    """
    if group_size(group) == 1:
        return x
    return _Collective.apply(x, partial(_all_reduce, group=group), _identity)


def copy_to_group(x: Shaped[Tensor, "*D"], *, group: Group) -> Shaped[Tensor, "*D"]:
    """Return a value that is the same on all ranks, each of which uses it for a part.

    Its gradients are summed over ranks (an all-reduce).
    """
    if group_size(group) == 1:
        return x
    return _Collective.apply(x, _identity, partial(_all_reduce, group=group))


def broadcast_from(x: Shaped[Tensor, "*D"], *, group: Group, source: int) -> None:
    """Overwrite ``x``, contiguous, with that of rank ``source`` of the group. No gradient."""
    with record_collective("broadcast", group=group):
        distributed.broadcast(x, group=group, group_src=source)


class _Collective(torch.autograd.Function):
    """Applies ``forward_fn`` to a tensor and ``backward_fn`` to the gradient of the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_fn: _Function, backward_fn: _Function) -> Tensor:
        ctx.backward_fn = backward_fn
        return forward_fn(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.backward_fn(grads[0]), None, None


def _identity(x: Tensor) -> Tensor:
    return x.view_as(x)


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
    if all(size == following for size, following in pairwise(sizes)):
        out = x.new_empty(sum(sizes), *x.shape[1:])
        with record_collective("all_gather", group=group):
            _all_gather(out, x.contiguous(), group=group)
        return out
    # gloo has no all-gather of unequal blocks; an all-to-all of copies sends the same bytes
    copies = x.repeat(ranks, *[1] * (x.dim() - 1))
    return _all_to_all(copies, group=group, input_splits=(x.shape[0],) * ranks, output_splits=sizes)


def _reduce_scatter_blocks(x: Tensor, *, group: Group, sizes: tuple[int, ...]) -> Tensor:
    """Do a reduce-scatter as an all-to-all and a local sum: same bytes, any sizes, one order."""
    own_size = sizes[group_rank(group)]
    parts = _all_to_all(
        x, group=group, input_splits=sizes, output_splits=(own_size,) * len(sizes)
    ).view(len(sizes), own_size, *x.shape[1:])
    if not x.dtype.is_floating_point:
        return parts.sum(0, dtype=x.dtype)
    return parts.sum(0, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)


def _all_reduce(x: Tensor, *, group: Group) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    with record_collective("all_reduce", group=group):
        distributed.all_reduce(total, group=group)
    return total
