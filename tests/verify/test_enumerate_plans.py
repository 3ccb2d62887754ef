"""The plans of a number of ranks: valid ones, a pairwise cover, and rejected ones."""

from itertools import combinations

import pytest

from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.moe.config import MoE
from moesaic.nn.attention_config import AttentionConfig
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.sparse_adaptation import SpIEL
from moesaic.testing.tiny_models import tiny_model_config, tiny_run
from moesaic.train.run import Run
from moesaic.verify.enumerate_plans import describe_plan, enumerate_plans

DEGREES = ("data", "context", "tensor", "expert", "expert_tensor", "zero")


def run_with(*, heads: int, experts: int = 8) -> Run:
    config = tiny_model_config(moe=MoE(experts=experts))
    model = config.replace(attention=AttentionConfig(heads=heads, head_dim=4))
    return tiny_run(model=model, gradient_accumulation_steps=4)


@pytest.mark.parametrize("world", [2, 3])
def test_every_plan_has_the_world_size_and_plans_are_distinct(world: int) -> None:
    plans = enumerate_plans([world], run=run_with(heads=8)).valid
    assert {parallel.plan.world_size for parallel in plans} == {world}
    assert len({parallel.to_yaml() for parallel in plans}) == len(plans)
    assert len({describe_plan(parallel) for parallel in plans}) == len(plans)


def test_every_plan_of_two_ranks_is_enumerated() -> None:
    plans = [p.plan for p in enumerate_plans([2], run=run_with(heads=8)).valid]
    dense = {(p.data, p.context, p.tensor) for p in plans if p.pipe == 1}
    folds = {(p.expert, p.expert_tensor) for p in plans if p.pipe == 1}
    assert dense == {(2, 1, 1), (1, 2, 1), (1, 1, 2)}
    assert folds == {(1, 1), (2, 1), (1, 2)}
    assert {p.zero for p in plans} == {0, 1, 2, 3}


def test_plans_without_replicas_have_no_zero() -> None:
    plans = [p.plan for p in enumerate_plans([2], run=run_with(heads=8)).valid]
    assert all(p.zero == 0 for p in plans if (p.tensor, p.expert) == (2, 2))


def test_a_plan_that_splits_heads_is_rejected_with_the_reason() -> None:
    plans = enumerate_plans([4], run=run_with(heads=2))
    assert not any(parallel.plan.tensor == 4 for parallel in plans.valid)
    refused = {why: len(several) for why, several in plans.rejected.items()}
    assert any("tensor=4" in why and "2 heads" in why for why in refused), refused


def test_the_pairwise_cover_has_every_pair_of_degrees() -> None:
    plans = enumerate_plans([2, 4], run=run_with(heads=8))
    few = plans.pairwise_cover()

    def pairs(several: tuple[ParallelConfig, ...]) -> set[object]:
        return {
            pair
            for parallel in several
            for pair in combinations([(n, getattr(parallel.plan, n)) for n in DEGREES], 2)
            if all(value > 1 or (name == "zero" and value) for name, value in pair)
        }

    assert pairs(few.valid) == pairs(plans.valid)
    assert len(few.valid) < len(plans.valid) / 3
    assert few.rejected == plans.rejected


def test_a_description_has_the_degrees_above_one() -> None:
    plan = ParallelPlan(data=2, tensor=2, expert=4, zero=3)
    assert describe_plan(ParallelConfig(plan=plan)) == "data 2, tensor 2, expert 4, zero 3"
    assert describe_plan(ParallelConfig(plan=ParallelPlan(data=1))) == "single process"


def test_a_pipeline_with_too_few_blocks_or_micro_batches_or_with_zero_is_rejected() -> None:
    run = run_with(heads=2)
    assert {p.plan.pipe for p in enumerate_plans([4], run=run).valid} == {1, 2}  # of two blocks
    few = enumerate_plans([2], run=run.replace(gradient_accumulation_steps=1)).valid
    assert {type(p.pipeline_schedule).__name__ for p in few if p.plan.pipe == 2} == {"GPipe"}
    assert not any(
        p.pipeline_schedule.splits_backward and p.plan.zero
        for p in enumerate_plans([4], run=run).valid
    )


def test_a_plan_that_what_is_trained_cannot_share_is_rejected() -> None:
    run = run_with(heads=8).replace(trainable=SpIEL())
    plans = enumerate_plans([2], run=run)
    assert all(p.plan.tensor == p.plan.pipe == 1 and not p.plan.zero for p in plans.valid)
    assert any("trainable=SpIEL under parallel.plan.tensor=2" in why for why in plans.rejected)
