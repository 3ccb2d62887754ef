"""The all-to-all dispatcher equals the local dispatcher, gradients included."""

import pytest
import torch
import torch.distributed as distributed

from moe.dispatch_cases import (
    CASES,
    E,
    F,
    Result,
    groups,
    local_tokens,
    make_experts,
    run_cases,
    run_dispatcher,
    single_process,
)
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.moe.all_to_all_dispatcher import AllToAllDispatcher
from moesaic.moe.dispatcher import Dispatcher, LocalDispatcher


def _expert_parallel() -> dict[str, Result]:
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    own = range(E)[rank * E // ranks :][: E // ranks]
    return run_cases(
        AllToAllDispatcher(distributed.group.WORLD),
        experts=lambda: make_experts(experts=own),
        cases=list(CASES),
    )


def _sliced() -> dict[str, Result]:
    """Two ranks share an expert's hidden width, two such pairs share the experts."""
    slices, over = groups(2)
    place, pair = distributed.get_rank() % 2, distributed.get_rank() // 2
    own, hidden = range(E)[pair * E // 2 :][: E // 2], slice(place * F // 2, (place + 1) * F // 2)
    return run_cases(
        AllToAllDispatcher(over, slice_group=slices),
        experts=lambda: make_experts(experts=own, hidden=hidden),
        cases=list(CASES),
    )


def _only_sliced() -> dict[str, Result]:
    rank = distributed.get_rank()
    return run_cases(
        AllToAllDispatcher(None, slice_group=distributed.group.WORLD),
        experts=lambda: make_experts(hidden=slice(rank, rank + 1)),
        cases=list(CASES),
    )


def _same_tokens(found: list[dict[str, Result]], case: str, expected: Result) -> None:
    for part in ("out", "x", "weight"):
        got = torch.cat([getattr(each[case], part) for each in found])
        torch.testing.assert_close(got, getattr(expected, part), rtol=1e-5, atol=1e-5)


def test_experts_on_other_ranks_equal_local_experts() -> None:
    found = run_on_ranks(4, _expert_parallel)
    for case in CASES:
        expected = single_process(case)
        _same_tokens(found, case, expected)
        torch.testing.assert_close(torch.cat([each[case].up for each in found]), expected.up)
        torch.testing.assert_close(torch.cat([each[case].down for each in found]), expected.down)


def test_sliced_experts_equal_unsliced_ones() -> None:
    found = run_on_ranks(4, _sliced)
    for case in CASES:
        expected = single_process(case)
        _same_tokens(found, case, expected)
        ups = [torch.cat([found[p][case].up, found[p + 1][case].up], -1) for p in (0, 2)]
        downs = [torch.cat([found[p][case].down, found[p + 1][case].down], 1) for p in (0, 2)]
        torch.testing.assert_close(torch.cat(ups), expected.up)
        torch.testing.assert_close(torch.cat(downs), expected.down)


def test_slices_need_no_other_split() -> None:
    found = run_on_ranks(4, _only_sliced)
    for case in CASES:
        expected = single_process(case)
        _same_tokens(found, case, expected)
        torch.testing.assert_close(torch.cat([each[case].up for each in found], -1), expected.up)


def _in_bfloat16() -> Result:
    rank = distributed.get_rank()
    own = range(E)[rank * E // 2 :][: E // 2]
    x, edges = local_tokens("uneven", rank=rank, dtype=torch.bfloat16)
    far = AllToAllDispatcher(distributed.group.WORLD)
    return run_dispatcher(far, experts=make_experts(experts=own).bfloat16(), edges=edges, x=x)


def test_rows_keep_their_dtype_in_the_exchange() -> None:
    found = run_on_ranks(2, _in_bfloat16)
    for rank, got in enumerate(found):
        x, edges = local_tokens("uneven", rank=rank, dtype=torch.bfloat16)
        local = run_dispatcher(
            LocalDispatcher(), experts=make_experts().bfloat16(), edges=edges, x=x
        )
        assert got.out.dtype == got.x.dtype == torch.bfloat16
        torch.testing.assert_close(got.out, local.out, rtol=0.02, atol=0.02)
        torch.testing.assert_close(got.x, local.x, rtol=0.02, atol=0.02)


def _refused() -> str:
    far = AllToAllDispatcher(distributed.group.WORLD)
    x, edges = local_tokens("uneven", rank=distributed.get_rank())
    with pytest.raises(ValueError, match="8 experts cannot be split evenly over 3 ranks") as caught:
        far.run_experts(x, routing=edges, experts=make_experts())
    return str(caught.value)


def test_experts_that_cannot_be_split_evenly_are_refused() -> None:
    run_on_ranks(3, _refused)


def test_a_null_group_is_the_local_dispatcher() -> None:
    dispatcher: Dispatcher = AllToAllDispatcher(None)
    assert isinstance(dispatcher, Dispatcher)
    x, edges = local_tokens("some dropped", rank=0)
    got = run_dispatcher(dispatcher, experts=make_experts(), edges=edges, x=x)
    local = run_dispatcher(LocalDispatcher(), experts=make_experts(), edges=edges, x=x)
    assert torch.equal(got.out, local.out)
