"""A plan is arithmetic: its groups cover the ranks, and what does not fit is refused."""

import math

import pytest

from moesaic.core.errors import ConfigError
from moesaic.distributed.parallel_plan import ParallelPlan, RankGrid
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.memory.tier import HostMemory
from moesaic.parallel.config import ParallelConfig

FOLDED = ParallelPlan(pipe=2, data=2, context=2, tensor=2, expert=4, expert_tensor=2)


def test_dense_and_expert_axes_name_the_same_ranks() -> None:
    dense, expert = FOLDED.resolve(16).axes(), FOLDED.resolve(16).axes(num_experts=8)
    assert math.prod(dense.values()) == math.prod(expert.values()) == 16
    assert expert == {"pipe": 2, "expert_data": 1, "expert": 4, "expert_tensor": 2}


def test_every_rank_is_in_one_group_of_every_axis() -> None:
    plan = FOLDED.resolve(16)
    for grid in (RankGrid(plan.axes()), RankGrid(plan.axes(num_experts=8))):
        for axis, size in grid.axes.items():
            groups = grid.groups((axis,))
            assert sorted(rank for group in groups for rank in group) == list(range(16))
            assert {len(group) for group in groups} == {size}


def test_rank_at_inverts_coordinates() -> None:
    grid = RankGrid(FOLDED.resolve(16).axes())
    assert [grid.rank_at(grid.coordinates(rank)) for rank in range(16)] == list(range(16))
    assert grid.coordinates(5) == {"pipe": 0, "data": 1, "context": 0, "tensor": 1}
    assert grid.group(5, ("data", "tensor")) == (0, 1, 4, 5)


def test_experts_are_sharded_over_consecutive_ranks() -> None:
    grid = RankGrid(ParallelPlan(expert=4).resolve(8).axes(num_experts=4))
    assert grid.groups(("expert",)) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert grid.groups(("expert_data",)) == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_data_takes_the_remaining_ranks() -> None:
    assert ParallelPlan(tensor=2, pipe=2).resolve(16).data == 4


@pytest.mark.parametrize(
    ("experts", "spread"),
    [(32, 32), (64, 64), (128, 128)],
)
def test_a_layer_of_fewer_experts_uses_fewer_ranks(experts: int, spread: int) -> None:
    # PR-MoE on 128 ranks: 32 experts over 32 ranks and 4 copies, 128 over all (2201.05596)
    axes = ParallelPlan(expert=128).resolve(128).axes(num_experts=experts)
    assert (axes["expert"], axes["expert_data"]) == (spread, 128 // spread)


@pytest.mark.parametrize(
    ("plan", "world", "says"),
    [
        (ParallelPlan(tensor=3), 8, "3 is 6 ranks, but there are 8"),
        (ParallelPlan(data=2), 8, "is 2 ranks, but there are 8"),
        (ParallelPlan(expert=3), 4, "expert 3 x expert_tensor 1 = 3 must divide"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_with_both_numbers(
    plan: ParallelPlan, world: int, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        plan.resolve(world)


def test_experts_that_do_not_divide_are_refused_with_the_divisors() -> None:
    with pytest.raises(ConfigError, match="neither divides the 6 experts"):
        ParallelPlan(expert=4).expert_ranks(6, layer="encoder.1")


@pytest.mark.parametrize(
    ("plan", "short"),
    [
        (ParallelPlan(expert=8), "E"),
        (ParallelPlan(expert=4), "E+D"),
        (ParallelPlan(expert=4, zero=2), "E+Z"),
        (ParallelPlan(expert=4, tensor=2), "E+D+M"),
        (ParallelPlan(expert=4, tensor=2, zero=2), "E+Z+M"),
        (ParallelPlan(), "D"),
    ],
)
def test_the_acronym_is_that_of_the_paper(plan: ParallelPlan, short: str) -> None:
    assert plan.resolve(8).acronym() == short
    offloaded = ParallelConfig(plan=plan.resolve(8), memory=MemoryPlan(gradients=HostMemory()))
    assert offloaded.acronym == short.replace("Z", "Z-Offload")
