"""The adaptive dispatcher gives the same output for all gather degrees."""

import pytest
import torch
import torch.distributed as distributed
from dispatch_volume import (
    DispatchedTokens,
    adaptive_experts_bytes,
    all_to_all_bytes,
    expert_tensor_bytes,
    gathered_expert_bytes,
)
from torch import nn

from moe.dispatch_cases import (
    FEW,
    D,
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
from moesaic.distributed.communication_counter import CommunicationCounter
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.moe.adaptive_dispatcher import (
    AdaptiveDispatcher,
    DispatchCosts,
    GatherDegrees,
    LinearCost,
    StepLoad,
    possible_gather_degrees,
)
from moesaic.moe.dispatcher import Dispatcher
from moesaic.moe.experts import ExpertShape, GroupedExperts, LoRAExpert
from moesaic.moe.routing import Routing
from moesaic.nn.feed_forward import FeedForwardConfig, SwiGLU

BY_BYTES = DispatchCosts(
    all_to_all=LinearCost(0, 1), gather_weights=LinearCost(0, 1), compute=LinearCost(0, 0)
)
SPLIT = [GatherDegrees(1), GatherDegrees(2), GatherDegrees(4)]
SLICED = [GatherDegrees(1, 1), GatherDegrees(1, 2), GatherDegrees(2, 2), GatherDegrees(2, 1)]
HALF = F // 2


def _split() -> list[dict[str, Result]]:
    rank = distributed.get_rank()
    own = range(E)[rank * E // 4 :][: E // 4]
    return [
        run_cases(
            AdaptiveDispatcher(distributed.group.WORLD, costs=BY_BYTES, candidates=[way]),
            experts=lambda: make_experts(experts=own),
            cases=FEW,
        )
        for way in SPLIT
    ]


def test_all_degrees_of_gathered_experts_give_the_same_output() -> None:
    for found in zip(*run_on_ranks(4, _split), strict=True):
        for case in FEW:
            expected = single_process(case)
            for part in ("out", "x", "weight", "up", "down"):
                got = torch.cat([getattr(each[case], part) for each in found])
                torch.testing.assert_close(got, getattr(expected, part), rtol=1e-5, atol=1e-5)


def _gated(hidden: slice, *, experts: range) -> GroupedExperts:
    """A slice of experts with a gated activation and biases."""
    torch.manual_seed(4)
    up, down = torch.randn(E, D, 2, F), torch.randn(E, F, D)
    own = list(experts)
    feed = FeedForwardConfig(hidden=len(range(F)[hidden]), activation=SwiGLU())
    made = GroupedExperts(ExpertShape(len(own), D, feed, bias=False))
    made.up = nn.Parameter(up[own][..., hidden].flatten(2).clone())
    made.down = nn.Parameter(down[own][:, hidden].clone())
    return made


def _sliced() -> list[Result]:
    """Two ranks share an expert's hidden width, two such pairs share the experts."""
    cuts, over = groups(2)
    place, pair = distributed.get_rank() % 2, distributed.get_rank() // 2
    own = range(E)[pair * E // 2 :][: E // 2]
    hidden = slice(place * HALF, (place + 1) * HALF)
    x, edges = local_tokens("some dropped", rank=distributed.get_rank())
    found = []
    for way in SLICED:
        dispatcher = AdaptiveDispatcher(over, slice_group=cuts, costs=BY_BYTES, candidates=[way])
        experts = _gated(hidden, experts=own)
        found.append(run_dispatcher(dispatcher, experts=experts, edges=edges, x=x))
    return found


def test_all_degrees_of_gathered_slices_give_the_same_output() -> None:
    every = run_on_ranks(4, _sliced)
    one = [local_tokens("some dropped", rank=rank) for rank in range(4)]
    for rank, found in enumerate(every):
        x, edges = one[rank]
        alone = run_dispatcher(
            AdaptiveDispatcher(None, costs=BY_BYTES),
            experts=_gated(slice(0, F), experts=range(E)),
            edges=edges,
            x=x,
        )
        for got in found:
            torch.testing.assert_close(got.out, alone.out, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(got.x, alone.x, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(got.weight, alone.weight, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(got.up, found[0].up, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(got.down, found[0].down, rtol=1e-5, atol=1e-5)


def _even(tokens: int) -> Routing:
    """A balanced routing of this rank's tokens, two experts each."""
    expert = torch.arange(2 * tokens).view(tokens, 2) % E
    return Routing.from_topk(torch.ones(tokens, 2), expert=expert, num_experts=E)


def _bytes(tokens: int) -> list[tuple[int, int]]:
    rank = distributed.get_rank()
    own = range(E)[rank * E // 4 :][: E // 4]
    found = []
    for way in SPLIT:
        dispatcher = AdaptiveDispatcher(distributed.group.WORLD, costs=BY_BYTES, candidates=[way])
        with CommunicationCounter() as wire:
            x = torch.randn(tokens, D)
            run_dispatcher(dispatcher, experts=make_experts(experts=own), edges=_even(tokens), x=x)
        found.append((wire.total_bytes(kind="all-to-all"), wire.total_bytes(kind="all-gather")))
    return found


def test_counted_bytes_equal_the_closed_form() -> None:
    tokens, bank_bytes = 16, 2 * E * D * F * 4
    rows = DispatchedTokens(tokens=tokens, experts_per_token=2, dim=D, itemsize=4)
    for found in run_on_ranks(4, _bytes, tokens):
        for way, (sent, gathered) in zip(SPLIT, found, strict=True):
            places = 4 // way.experts
            counts = (places - 1) * E // places * 8
            lent = gathered_expert_bytes(expert_bytes=bank_bytes, ranks=4, gather_size=way.experts)
            moved = all_to_all_bytes(rows, ranks=places)
            assert gathered == lent
            # forward and backward; gradients of what was lent are summed by an all-to-all
            assert sent == 2 * moved + counts + lent
            both = adaptive_experts_bytes(
                rows, expert_bytes=bank_bytes, ranks=4, gather_size=way.experts
            )
            assert both == moved + lent


def test_balanced_loads_cost_the_closed_form() -> None:
    load = torch.full((4, 2, 8), 4)
    step = StepLoad(load, row_bytes=10, weight_bytes=100)
    rows = DispatchedTokens(tokens=16, experts_per_token=2, dim=10, itemsize=1)
    for way in (GatherDegrees(1, 1), GatherDegrees(1, 2), GatherDegrees(2, 2), GatherDegrees(4, 2)):
        moved = step.traffic(way)
        assert 2 * moved.rows == all_to_all_bytes(rows, ranks=4 // way.experts)
        assert 2 * moved.copies == expert_tensor_bytes(rows, expert_tensor=2 // way.slices)
        assert moved.weights == (way.experts * way.slices - 1) * 100
        assert moved.work == 32  # all lend: its own rows, whole; nobody: twice as many, by halves


def _chosen() -> list[GatherDegrees]:
    """Degrees chosen for tokens on one rank only, then for many tokens on all ranks."""
    rank = distributed.get_rank()
    own = range(E)[rank * E // 4 :][: E // 4]
    dispatcher = AdaptiveDispatcher(distributed.group.WORLD, costs=BY_BYTES)
    return [
        dispatcher.choose(
            torch.randn(tokens, D), routing=_even(tokens), experts=make_experts(experts=own)
        )
        for tokens in (4 if rank == 1 else 0, 16, 400)
    ]


def test_all_ranks_choose_the_same_degrees_by_the_load() -> None:
    for found in run_on_ranks(4, _chosen):
        assert found == [GatherDegrees(1), GatherDegrees(1), GatherDegrees(4)]


def test_a_skewed_load_makes_gathering_weights_cheaper() -> None:
    even, skewed = torch.full((4, 1, 4), 8), torch.zeros(4, 1, 4, dtype=torch.int64)
    skewed[:, :, 0] = 32
    prices = DispatchCosts(
        all_to_all=LinearCost(0, 0.01), gather_weights=LinearCost(0, 0.01), compute=LinearCost(0, 1)
    )
    ways = possible_gather_degrees(4, slices=1)

    def chosen(load: torch.Tensor) -> GatherDegrees:
        step = StepLoad(load, row_bytes=10, weight_bytes=1000)
        return min(ways, key=lambda way: step.seconds(way, costs=prices))

    assert chosen(even) == GatherDegrees(1)
    assert chosen(skewed) == GatherDegrees(4)


def test_degrees_gather_slices_before_experts() -> None:
    assert possible_gather_degrees(4, slices=2) == [
        GatherDegrees(1, 1),
        GatherDegrees(1, 2),
        GatherDegrees(2, 2),
        GatherDegrees(4, 2),
    ]


def _refused() -> None:
    x, edges = local_tokens("uneven", rank=distributed.get_rank())
    dispatcher: Dispatcher = AdaptiveDispatcher(distributed.group.WORLD, costs=BY_BYTES)
    low_rank = LoRAExpert(rank=2).build(ExpertShape(E, D, FeedForwardConfig(hidden=F), bias=False))
    with pytest.raises(TypeError, match="only the weights of GroupedExperts can be gathered"):
        dispatcher.run_experts(x, routing=edges, experts=low_rank)


def test_only_weights_of_grouped_experts_can_be_gathered() -> None:
    run_on_ranks(2, _refused)
