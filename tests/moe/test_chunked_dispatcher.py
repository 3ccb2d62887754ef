"""The chunked dispatcher equals the unchunked one and overlaps chunks with compute."""

import pytest
import torch
import torch.distributed as distributed

from moe.dispatch_cases import (
    FEW,
    E,
    Result,
    local_tokens,
    make_experts,
    run_cases,
    run_dispatcher,
    single_process,
)
from moesaic.distributed.communication_counter import CommunicationCounter
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.moe.all_to_all_dispatcher import AllToAllDispatcher
from moesaic.moe.chunked_dispatcher import ChunkedAllToAllDispatcher, OverlapDegrees
from moesaic.moe.dispatcher import Dispatcher

DEGREES = [OverlapDegrees(1, 1), OverlapDegrees(4, 2), OverlapDegrees(1, 8), OverlapDegrees(2, 3)]


def _chunked() -> list[dict[str, Result]]:
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    own = range(E)[rank * E // ranks :][: E // ranks]
    return [
        run_cases(
            ChunkedAllToAllDispatcher(distributed.group.WORLD, degrees=degrees),
            experts=lambda: make_experts(experts=own),
            cases=FEW,
        )
        for degrees in DEGREES
    ]


def test_chunked_output_equals_unchunked() -> None:
    for degrees, found in zip(DEGREES, zip(*run_on_ranks(4, _chunked), strict=True), strict=True):
        for case in FEW:
            expected = single_process(case)
            for part in ("out", "x", "weight", "up", "down"):
                got = torch.cat([getattr(each[case], part) for each in found])
                torch.testing.assert_close(
                    got,
                    getattr(expected, part),
                    rtol=1e-5,
                    atol=1e-5,
                    msg=lambda text, at=f"{degrees}, {case}, {part}": f"{at}: {text}",
                )


def _calls() -> list[tuple[int, int]]:
    """All-to-alls of rows that start in the forward pass and in the backward pass."""
    rank = distributed.get_rank()
    own = range(E)[rank * E // 2 :][: E // 2]
    x, edges = local_tokens("uneven", rank=rank)
    x = x.requires_grad_()
    found = []
    for degrees in DEGREES:
        way = ChunkedAllToAllDispatcher(distributed.group.WORLD, degrees=degrees)
        forward, backward = CommunicationCounter(), CommunicationCounter()
        with forward:
            out = way.run_experts(x, routing=edges, experts=make_experts(experts=own))
        with backward:
            out.sum().backward()
        found.append((forward.num_calls("all-to-all"), backward.num_calls("all-to-all")))
    return found


def test_each_pass_has_its_number_of_chunks() -> None:
    for found in run_on_ranks(2, _calls):
        # out and home, and the counts once
        assert found == [(2 * d.forward + 1, 2 * d.backward) for d in DEGREES]


class _Watching:
    """Experts that record how many all-to-alls have started before each call."""

    def __init__(self, rank: int) -> None:
        self.experts = make_experts(experts=range(E)[rank * E // 2 :][: E // 2])
        self.wire = CommunicationCounter()
        self.forward, self.backward = [], []

    def __call__(self, rows, *, groups):
        return self.experts(rows, groups=groups)

    def forward_edges(self, x, *, edges):
        self.forward.append(self.wire.num_calls("all-to-all"))
        out = self.experts.forward_edges(x, edges=edges)
        out.register_hook(self._note)
        return out

    def in_one_call(self, x, *, function):
        return function(x, self)

    def _note(self, _):
        self.backward.append(self.wire.num_calls("all-to-all"))


def _in_flight() -> tuple[list[int], list[int]]:
    rank = distributed.get_rank()
    x, edges = local_tokens("uneven", rank=rank)
    experts = _Watching(rank)
    with experts.wire:
        way = ChunkedAllToAllDispatcher(distributed.group.WORLD, degrees=OverlapDegrees(2, 4))
        out = way.run_experts(x.requires_grad_(), routing=edges, experts=experts)
        out.sum().backward()
    return experts.forward, experts.backward


def test_the_next_chunk_is_sent_while_experts_compute() -> None:
    for forward, backward in run_on_ranks(2, _in_flight):
        # counts and two chunks out; the first chunk of answers left after the second of four pieces
        assert forward == [3, 3, 4, 4]
        # those five, four chunks of gradients, and one more back after each piece
        assert backward == [9, 10, 11, 12]


def test_a_null_group_is_the_local_dispatcher() -> None:
    way: Dispatcher = ChunkedAllToAllDispatcher(None, degrees=OverlapDegrees(2, 4))
    assert isinstance(way, Dispatcher)
    x, edges = local_tokens("some dropped", rank=0)
    got = run_dispatcher(way, experts=make_experts(), edges=edges, x=x)
    flat = run_dispatcher(AllToAllDispatcher(None), experts=make_experts(), edges=edges, x=x)
    assert torch.equal(got.out, flat.out)


def test_zero_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one chunk"):
        OverlapDegrees(0, 2)
