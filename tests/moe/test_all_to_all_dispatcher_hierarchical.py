"""The deduplicated and hierarchical all-to-all equal the local dispatcher."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as distributed
from dispatch_volume import (
    DispatchedTokens,
    all_to_all_inter_node_bytes,
    hierarchical_inter_node_bytes,
    mean_remote_nodes,
)

from moe.dispatch_cases import (
    CASES,
    D,
    E,
    K,
    Result,
    groups,
    local_tokens,
    make_experts,
    run_cases,
    run_dispatcher,
    single_process,
)
from moesaic.distributed.communication_counter import CommunicationCounter
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.moe.all_to_all_dispatcher import (
    AllToAllDispatcher,
    DeduplicatedAllToAllDispatcher,
    hierarchical_dispatcher,
)
from moesaic.moe.dispatcher import Dispatcher
from moesaic.moe.routing import Routing


def _one_hop() -> Dispatcher:
    return DeduplicatedAllToAllDispatcher(distributed.group.WORLD)


def _two_hops() -> Dispatcher:
    inside, nodes = groups(2)
    return hierarchical_dispatcher(inter_node=nodes, intra_node=inside)


def _hop_and_rows() -> Dispatcher:
    inside, nodes = groups(2)
    return DeduplicatedAllToAllDispatcher(nodes, inner=AllToAllDispatcher(inside))


def _results(build: Callable[[], Dispatcher]) -> list[dict[str, Result]]:
    own = range(E)[distributed.get_rank() * E // 4 :][: E // 4]
    return [run_cases(build(), experts=lambda: make_experts(experts=own), cases=list(CASES))]


@pytest.mark.parametrize("build", [_one_hop, _two_hops, _hop_and_rows])
def test_deduplicated_all_to_all_equals_local_experts(build: Callable[[], Dispatcher]) -> None:
    for found in zip(*run_on_ranks(4, _results, build), strict=True):
        for case in CASES:
            expected = single_process(case)
            for part in ("out", "x", "weight"):
                got = torch.cat([getattr(each[case], part) for each in found])
                torch.testing.assert_close(got, getattr(expected, part), rtol=1e-5, atol=1e-5)
            for part in ("up", "down"):
                got = torch.cat([getattr(each[case], part) for each in found])
                torch.testing.assert_close(got, getattr(expected, part), rtol=1e-5, atol=1e-5)


def _leaving() -> dict[str, tuple[int, int]]:
    """Bytes of rows between nodes, flat and hierarchical, dispatch and combine."""
    rank = distributed.get_rank()
    inside, nodes = groups(2)
    every = distributed.group.WORLD
    ways = {
        "flat": AllToAllDispatcher(every),
        "hops": hierarchical_dispatcher(inter_node=nodes, intra_node=inside),
    }
    x, _ = local_tokens("uneven", rank=0)
    x = x[:1].repeat(28, 1)
    pairs = torch.combinations(torch.arange(E), K)  # every set of experts once
    edges = Routing.from_topk(torch.ones(28, K), expert=pairs, num_experts=E)
    own = range(E)[rank * E // 4 :][: E // 4]
    found = {}
    for name, way in ways.items():
        with CommunicationCounter() as wire:
            run_dispatcher(way, experts=make_experts(experts=own), edges=edges, x=x)
        found[name] = wire.inter_node_bytes(ranks_per_node=2)
    return found


def test_each_token_is_sent_to_a_node_once() -> None:
    rows = DispatchedTokens(tokens=28, experts_per_token=K, dim=D, itemsize=4)
    assert mean_remote_nodes(experts=E, nodes=2, experts_per_token=K) == 1 - 6 / 28
    flat = 2 * all_to_all_inter_node_bytes(rows, ranks=4, ranks_per_node=2)  # forward and backward
    hops = 2 * hierarchical_inter_node_bytes(rows, experts=E, nodes=2)
    for found in run_on_ranks(4, _leaving):
        counts = 2 * E // 4 * 8  # what the host has to know: rows per expert of two ranks
        assert found["flat"] == flat + counts
        # beside the counts: the address of each edge, its weight and the weight's gradient
        assert found["hops"] == hops + 2 * 8 + 28 * (8 + 4 + 4)
        assert found["hops"] < found["flat"]


def _refused() -> None:
    x, edges = local_tokens("uneven", rank=distributed.get_rank())
    dispatcher = DeduplicatedAllToAllDispatcher(distributed.group.WORLD)
    with pytest.raises(ValueError, match="8 experts cannot be split evenly over 3 ranks"):
        dispatcher.run_experts(x, routing=edges, experts=make_experts())


def test_experts_that_cannot_be_split_evenly_are_refused() -> None:
    run_on_ranks(3, _refused)


def test_a_null_group_is_the_inner_dispatcher() -> None:
    x, edges = local_tokens("some dropped", rank=0)
    got = run_dispatcher(
        hierarchical_dispatcher(inter_node=None, intra_node=None),
        experts=make_experts(),
        edges=edges,
        x=x,
    )
    assert torch.equal(
        got.out,
        run_dispatcher(AllToAllDispatcher(None), experts=make_experts(), edges=edges, x=x).out,
    )
