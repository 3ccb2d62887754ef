"""Differentiable collectives: values, and gradients by the dual collective."""

from typing import Any

import pytest
import torch
import torch.distributed as distributed

from moesaic.distributed.collectives import (
    all_gather_rows,
    all_to_all,
    copy_to_group,
    reduce_from_group,
    reduce_scatter_rows,
)
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.process_groups import group_rank, group_size

RANKS, D = 4, 3
SENT = ((0, 2, 1, 0), (3, 0, 0, 0), (0, 0, 0, 0), (1, 1, 1, 2))  # [from, to]; rank 2 has no rows
SIZES = {"equal": (2, 2, 2, 2), "uneven": (2, 0, 3, 1), "none": (0, 0, 0, 0)}
DTYPES = (torch.float32, torch.bfloat16, torch.int64)


def _rows(count: int, *, rank: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (100 * rank + torch.arange(count * D)).view(count, D).to(dtype)


def _grad_back(out: torch.Tensor, x: torch.Tensor, *, rank: int) -> list[list[float]]:
    """Gradient of ``x`` if that of row i of rank r's output is (r + 1) * (i + 1)."""
    scale = (rank + 1.0) * torch.arange(1, len(out) + 1)[:, None]
    (out * scale).sum().backward()
    assert x.grad is not None
    return x.grad[:, 0].tolist()


def _exchanges() -> dict[str, Any]:
    group, rank = distributed.group.WORLD, distributed.get_rank()
    assert (group_size(group), group_rank(group)) == (RANKS, rank)
    sent, received = SENT[rank], [row[rank] for row in SENT]
    found: dict[str, Any] = {}
    for dtype in DTYPES:
        x = _rows(sum(sent), rank=rank, dtype=dtype)
        out = all_to_all(x, group=group, input_splits=sent, output_splits=received)
        assert out.dtype == dtype
        found[str(dtype)] = out.double()
    x = _rows(sum(sent), rank=rank).requires_grad_()
    out = all_to_all(x, group=group, input_splits=sent, output_splits=received)
    return {**found, "grad": _grad_back(out, x, rank=rank)}


def test_all_to_all_keeps_rank_order_and_backward_reverses_it() -> None:
    found = run_on_ranks(RANKS, _exchanges)
    starts = [[sum(row[:r]) for r in range(RANKS)] for row in SENT]
    for to, got in enumerate(found):
        for dtype in DTYPES:
            blocks = [
                _rows(sum(SENT[r]), rank=r, dtype=dtype)[starts[r][to] :][: SENT[r][to]]
                for r in range(RANKS)
            ]
            assert torch.equal(got[str(dtype)], torch.cat(blocks).double())
        back = []
        for other in range(RANKS):
            before = sum(SENT[r][other] for r in range(to))
            back += [(other + 1.0) * (before + i + 1) for i in range(SENT[to][other])]
        assert got["grad"] == back


def _gathers(sizes: tuple[int, ...]) -> dict[str, Any]:
    group, rank = distributed.group.WORLD, distributed.get_rank()
    found: dict[str, Any] = {}
    for dtype in DTYPES:
        whole = all_gather_rows(
            _rows(sizes[rank], rank=rank, dtype=dtype), group=group, sizes=sizes
        )
        parts = _rows(sum(sizes), rank=rank, dtype=dtype)
        summed = reduce_scatter_rows(parts, group=group, sizes=sizes)
        assert (whole.dtype, summed.dtype) == (dtype, dtype)
        found[str(dtype)] = (whole.double(), summed.double())
    x = _rows(sizes[rank], rank=rank).requires_grad_()
    found["grad"] = _grad_back(all_gather_rows(x, group=group, sizes=sizes), x, rank=rank)
    parts = _rows(sum(sizes), rank=rank).requires_grad_()
    found["sum grad"] = _grad_back(
        reduce_scatter_rows(parts, group=group, sizes=sizes), parts, rank=rank
    )
    return found


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_all_gather_and_reduce_scatter_are_dual(sizes: tuple[int, ...]) -> None:
    found = run_on_ranks(RANKS, _gathers, sizes)
    places = [sum(sizes[:r]) for r in range(RANKS)]
    of_all = sum(r + 1.0 for r in range(RANKS))
    for rank, got in enumerate(found):
        for dtype in DTYPES:
            blocks = [_rows(sizes[r], rank=r, dtype=dtype).double() for r in range(RANKS)]
            parts = [_rows(sum(sizes), rank=r, dtype=dtype).double() for r in range(RANKS)]
            whole, summed = got[str(dtype)]
            assert torch.equal(whole, torch.cat(blocks))
            own = sum(parts)[places[rank] :][: sizes[rank]]
            assert torch.equal(summed, own.to(dtype).double())
        assert got["grad"] == [of_all * (places[rank] + i + 1) for i in range(sizes[rank])]
        each = [(r + 1.0) * (i + 1) for r in range(RANKS) for i in range(sizes[r])]
        assert got["sum grad"] == each


def _sums() -> dict[str, Any]:
    group, rank = distributed.group.WORLD, distributed.get_rank()
    parts = torch.full((2,), rank + 1.0, requires_grad=True)
    total = reduce_from_group(parts, group=group)
    (total * 3).sum().backward()
    whole = torch.ones(2, requires_grad=True)
    (copy_to_group(whole, group=group) * (rank + 1)).sum().backward()
    assert parts.grad is not None
    assert whole.grad is not None
    return {"sum": total.tolist(), "part": parts.grad.tolist(), "copy": whole.grad.tolist()}


def test_reduce_from_group_and_copy_to_group_are_dual() -> None:
    for got in run_on_ranks(RANKS, _sums):
        assert got == {"sum": [10.0, 10.0], "part": [3.0, 3.0], "copy": [10.0, 10.0]}


@pytest.mark.parametrize("x", [torch.ones(2, 3), torch.ones(0, 3)])
def test_a_group_of_none_returns_its_input(x: torch.Tensor) -> None:
    rows = [len(x)]
    assert all_to_all(x, group=None, input_splits=rows, output_splits=rows) is x
    assert all_gather_rows(x, group=None, sizes=rows) is x
    assert reduce_scatter_rows(x, group=None, sizes=rows) is x
    assert reduce_from_group(x, group=None) is x
    assert copy_to_group(x, group=None) is x
