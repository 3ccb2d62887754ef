"""The order of plans that others have measured, of 46B and 27B parameters on 32 GH200."""

from streamed_experts import forecast, nodes_of_four, request, tokens_per_second

from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.plan_problems import memory_problems
from moesaic.planner.plan_forecast import PlanForecast
from moesaic.planner.plan_report import find_plans, machine_limits, training_problems
from moesaic.planner.plan_space import STREAMED, CompletePlan, Option

LIMITS = machine_limits(nodes_of_four(), ranks=32)


def _fits(found: PlanForecast) -> bool:
    return LIMITS.excess(found.by_tier)[0] <= 1


def test_small_expert_parallelism_with_streamed_experts_beats_large_that_crosses_nodes():
    small, large = (forecast("46B", tensor=4, expert=n) for n in (4, 8))
    streamed = forecast("46B", tensor=4, expert=4, streamed=True)
    assert [_fits(each) for each in (small, large, streamed)] == [False, True, True]
    assert tokens_per_second(streamed) > 1.05 * tokens_per_second(large)


def test_streaming_experts_that_fit_costs_time():
    resident, streamed = (
        forecast("27B", tensor=2, expert=4, streamed=away) for away in (False, True)
    )
    assert _fits(resident)
    assert 0.75 < tokens_per_second(streamed) / tokens_per_second(resident) < 1


def test_no_tier_takes_experts_of_which_zero_shards_copies():
    choice = forecast("27B", tensor=2, expert=4, streamed=True).choice
    asked, option = request("27B"), choice.option
    sharded = CompletePlan(choice.degrees, Option(1, option.memory, option.checkpointing))
    (problem,) = training_problems(asked)(sharded)
    assert "the 256 experts of a layer over the 8 ranks with copies" in problem
    alone = sharded.parallel_config(ParallelConfig())
    alone = alone.replace(plan=alone.plan.replace(expert=32))
    assert not [*memory_problems(alone.memory, plan=alone.plan, expert_counts=(256,))]
    space = asked.space.replace(memory=(STREAMED,), zero=(1,), max_tensor=2)
    found = find_plans(
        asked.replace(space=space), machine=nodes_of_four(), limits=LIMITS, keep=1
    ).best[0]
    assert found.choice.degrees.expert == 32
