"""Law: the search offers a plan if and only if training accepts it, and refuses in the same words.

And what training accepts has a price.
"""

import random
from collections.abc import Iterator

import pytest
from plan_cases import small_model, small_plan_model, small_space

from moesaic.core.errors import ConfigError
from moesaic.memory.tier import HostMemory
from moesaic.model.config import ModelConfig
from moesaic.model.transformer import Transformer
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallelize import check_parallel
from moesaic.parallel.pipeline_schedules import Interleaved
from moesaic.parallel.sparse_adaptation import SpIEL
from moesaic.parallel.trainable_parameters import AllParameters, TrainableParameters
from moesaic.planner.cost_entries import DEVICE, DISK, HOST
from moesaic.planner.cost_settings import CostSettings
from moesaic.planner.plan_forecast import Limits
from moesaic.planner.plan_report import PlanRequest, training_problems
from moesaic.planner.plan_space import GRADIENTS_ON_HOST, RESIDENT, STREAMED, CompletePlan
from moesaic.planner.search import search
from moesaic.planner.step_cost import step_cost
from moesaic.testing.tiny_models import tiny_run
from moesaic.train.run_checks import pipeline_has_enough_micro_batches

AHEAD = GRADIENTS_ON_HOST.replace(run_ahead_bytes=100)
WEIGHTS_ALONE = RESIDENT.replace(parameters=HostMemory())
SPACE = small_space(
    4, max_micro_rows=2, zero=(0, 1, 3), memory=(RESIDENT, AHEAD, STREAMED, WEIGHTS_ALONE)
)
DENSE = small_model().replace(decoder=small_model().decoder.replace(moe_every=0))
CASES: dict[str, tuple[ModelConfig, ParallelConfig, TrainableParameters]] = {
    "experts": (small_model(), ParallelConfig(), AllParameters()),
    "dense": (DENSE, ParallelConfig(), AllParameters()),
    "interleaved": (
        small_model(),
        ParallelConfig(pipeline_schedule=Interleaved()),
        AllParameters(),
    ),
    "SpIEL": (small_model(), ParallelConfig(), SpIEL(density=0.1)),
}


def _refusals(model: Transformer, choice: CompletePlan, request: PlanRequest) -> Iterator[str]:
    """Yield what a trainer says before it starts."""
    parallel = choice.parallel_config(request.parallel)
    try:
        check_parallel(model, parallel=parallel, plan=parallel.plan)
    except ConfigError as error:
        yield from error.problems
    yield from request.trainable.parallel_problems(parallel.plan, memory=parallel.memory)
    accumulation = choice.degrees.micro_batches
    run = tiny_run(model=request.model).model_copy(
        update={"parallel": parallel, "gradient_accumulation_steps": accumulation}
    )
    yield from pipeline_has_enough_micro_batches(run)


@pytest.mark.parametrize("name", CASES)
def test_the_search_offers_what_training_accepts(name: str) -> None:
    config, parallel, trainable = CASES[name]
    request = PlanRequest(
        name=name, model=config, space=SPACE, parallel=parallel, trainable=trainable
    )
    model, problems = Transformer.without_values(config), training_problems(request)
    accepted: list[CompletePlan] = []
    draw = random.Random(name)
    every = [CompletePlan(d, o) for d in SPACE.degrees(config) for o in SPACE.options()]
    for choice in draw.sample(every, min(len(every), 200)):
        try:
            found = list(problems(choice))
            assert sorted(found) == sorted(_refusals(model, choice, request))
        except ConfigError:  # too few blocks for the stages: the search asks of that before
            with pytest.raises(ConfigError):
                parallel.replace(plan=choice.plan).pipeline_stages(config)
            continue
        if not found:
            accepted.append(choice)
    assert 0 < len(accepted) < len(every)
    for choice in accepted[:4]:
        settings = CostSettings(
            model=config,
            parallel=choice.parallel_config(parallel),
            sizes=SPACE.micro_batch(choice.degrees.rows),
            micro_batches=choice.degrees.micro_batches,
            world=SPACE.ranks,
            trainable=trainable,
        )
        assert step_cost(settings).peak[DEVICE] > 0


def test_no_plan_that_is_kept_is_refused() -> None:
    request = PlanRequest(name="dense", model=small_model(), space=SPACE)
    problems, model = training_problems(request), Transformer.without_values(small_model())
    limits = Limits({DEVICE: 2e6, HOST: 1e9, DISK: 1e9})
    result = search(
        small_plan_model(SPACE),
        limits=limits,
        keep=1000,
        trains=lambda choice: not any(problems(choice)),
    )
    assert result.best
    for found in result.best:
        assert not [*_refusals(model, found.choice, request)]
