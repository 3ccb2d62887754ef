"""Parts of a model are trained under every plan; the others keep their values and have no state."""

from collections import Counter

import pytest
import torch
import torch.distributed as distributed

from moesaic.core.errors import ConfigError
from moesaic.distributed.forked_ranks import run_cases_on_ranks
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.memory.tier import HostMemory
from moesaic.model.parameter_flop_count import BatchDims
from moesaic.optim.optimizer_state import frozen_state
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.low_rank_adaptation import LoRA
from moesaic.parallel.sparse_adaptation import RandomSparse, SpIEL
from moesaic.parallel.trainable_parameters import MatchingParameters
from moesaic.planner.cost_entries import Purpose
from moesaic.planner.dry_run import simulate_step
from moesaic.planner.inventory_cache import inventory_of
from moesaic.planner.machine import find_machine
from moesaic.planner.plan_report import PlanRequest, find_plans, machine_limits
from moesaic.planner.plan_space import PlanSpace
from moesaic.planner.scale_report import ScaleConfig
from moesaic.planner.state_bytes import PlanKey, ShardedState
from moesaic.planner.step_cost import step_cost
from moesaic.testing.tiny_models import tiny_model_config, tiny_run, tiny_trainer
from moesaic.train.loop import training_loop
from moesaic.train.run_checks import check_run
from moesaic.train.run_training import seeded_trainer
from moesaic.train.sparse_selection import selection_hooks
from moesaic.verify.compare_plans import make_setup
from moesaic.verify.record_run import gather_full_tensors
from moesaic.verify.shrink_config import shrink_config
from moesaic.verify.synthetic_batches import UnevenBatches

EXPERTS = MatchingParameters(patterns=("*.experts.*",))
AWAY = MemoryPlan(parameters=HostMemory(), gradients=HostMemory(), optimizer_states=HostMemory())
PLANS = (
    ParallelConfig(plan=ParallelPlan(data=2, expert=2, zero=3)),
    ParallelConfig(plan=ParallelPlan(data=2, expert=2), memory=AWAY),
    ParallelConfig(plan=ParallelPlan(pipe=2, data=1)),
)
REPLICATED = ParallelConfig(plan=ParallelPlan(data=2, zero=0))
ADAPTER_PLANS = (
    *PLANS,
    ParallelConfig(plan=ParallelPlan(data=1, tensor=2, expert=2)),
    ParallelConfig(plan=ParallelPlan(data=1, context=2, expert_tensor=2)),
)


def setup(trainable):
    model = tiny_model_config(layers=2)
    stack = model.decoder.replace(first_dense_layers=0)
    run = shrink_config(tiny_run(model=model.replace(encoder=stack, decoder=stack))).run
    return make_setup(run.replace(gradient_accumulation_steps=2, trainable=trainable))


def trained(case):
    """Return all weights before and after two steps, and the parameters that have states."""
    trainable, parallel = case
    made = setup(trainable)
    world = ProcessGroupWorld() if distributed.is_initialized() else SingleProcess()
    trainer = seeded_trainer(
        made.run.replace(parallel=parallel),
        make_loader=lambda replica: UnevenBatches(
            made.shape, seed=1, shard=replica.rank, num_shards=replica.num_replicas
        ),
        world=world,
    )

    def weights():
        named = dict(trainer.model.named_parameters())
        part = trainer.parallel_model
        shapes = {name: placement.shape for name, placement in part.sharding_plan.items()}
        return gather_full_tensors(named, parallel_model=part, shapes=shapes)[0]

    before = weights()
    training_loop(trainer, hooks=selection_hooks(trainer), until=2)
    groups = trainer.optimizer.param_groups
    return before, weights(), {name for group in groups for name in group["param_names"]}


@pytest.mark.parametrize(
    ("trainable", "part", "plans"),
    [
        (EXPERTS, ".experts.", PLANS),
        (LoRA(rank=2), ".adapter.", ADAPTER_PLANS),
        (RandomSparse(density=0.05), ".adapter.", PLANS[::2]),
        (SpIEL(density=0.05, every=2, select_steps=1), ".adapter.", [REPLICATED]),
    ],
)
def test_only_what_is_chosen_is_trained_under_every_plan(trainable, part, plans):
    before, after, states = trained((trainable, ParallelConfig()))
    assert {n for n in before if not torch.equal(before[n], after[n])} == states
    assert states == {name for name in before if part in name}
    for ranks in run_cases_on_ranks(2, trained, [(trainable, plan) for plan in plans]):
        assert isinstance(ranks, list), ranks
        _, found, _ = ranks[0]
        assert set().union(*(held for *_, held in ranks)) == states
        for name, tensor in after.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
            assert name in states or torch.equal(found[name], before[name])


def test_a_pattern_that_matches_nothing_is_refused_with_names_that_are_near():
    run = tiny_run(trainable=MatchingParameters(patterns=("*.expert.*", "decoder.*")))
    with pytest.raises(ConfigError, match=r"no parameter matches '\*\.expert\.\*'.*experts") as e:
        check_run(run)
    assert "'decoder.*'" not in str(e.value)


def test_a_stage_without_trained_parameters_is_refused():
    part = MatchingParameters(patterns=("decoder.1.*",))
    made = setup(EXPERTS)
    run = made.run.replace(trainable=part, parallel=PLANS[-1])

    def start(_):
        with pytest.raises(ConfigError, match="a stage of the pipeline has none"):
            seeded_trainer(
                run,
                make_loader=lambda _: UnevenBatches(made.shape, seed=1),
                world=ProcessGroupWorld(),
            )

    assert list(run_cases_on_ranks(2, start, [0])) == [[None, None]]


FORECAST = {"experts": EXPERTS, "LoRA": LoRA(rank=2), "SpIEL": SpIEL(density=0.05)}


@pytest.mark.parametrize("name", FORECAST)
def test_every_forecast_has_gradients_and_states_of_trained_parameters_alone(name):
    choice = FORECAST[name]
    run = setup(EXPERTS).run.replace(trainable=choice, parallel=ParallelConfig())
    trainer = tiny_trainer(run)
    trainer.train_step()
    sizes = BatchDims(rows=1, source=4, target=4)
    config = ScaleConfig(model=run.model, optimizer=run.optimizer, trainable=choice)
    cost = step_cost(config.cost_settings(world=1, sizes=sizes).replace(device="cpu"))
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    states = frozen_state(trainer.optimizer).values()
    assert cost.held_bytes(purpose=Purpose.GRADIENTS) == sum(p.nbytes for p in trained)
    assert cost.held_bytes(purpose=Purpose.STATES) == sum(state.nbytes for state in states)
    weights = sum(p.nbytes for p in trainer.model.parameters())
    assert cost.held_bytes(purpose=Purpose.WEIGHTS) == weights
    inventory = inventory_of(run.model, trainable=choice)
    state = ShardedState(inventory, optimizer=run.optimizer, each=run.precision)
    planned = state.of_plan(PlanKey(1, 1, 1, 1, 1, zero=0))
    assert (planned.weights, planned.gradients) == (weights, sum(p.nbytes for p in trained))
    counters = 4 * len(trained)
    assert abs(planned.states - sum(state.nbytes for state in states)) <= counters


def test_the_forecast_of_adapters_equals_a_simulated_step_under_a_plan():
    plan = ParallelPlan(data=2, tensor=2, expert=2, zero=1)
    run = setup(EXPERTS).run
    sizes = BatchDims(rows=2, source=4, target=4)
    config = ScaleConfig(
        model=run.model, parallel=ParallelConfig(plan=plan), trainable=LoRA(rank=2)
    )
    settings = config.cost_settings(world=4, sizes=sizes)
    cost, simulated = step_cost(settings), simulate_step(settings)
    for purpose, found in (
        (Purpose.WEIGHTS, simulated.weights),
        (Purpose.GRADIENTS, simulated.gradients),
        (Purpose.STATES, simulated.optimizer),
    ):
        assert cost.held_bytes(purpose=purpose) == found, purpose
    sent = [Counter[str](), Counter[str]()]
    for sums, lines in zip(sent, (cost.sent, simulated.sent), strict=True):
        for line in lines:
            sums[line.kind] += line.bytes  # equal groups are named by other axes
    assert sent[0] == sent[1]


def test_no_plan_is_found_that_the_choice_cannot_be_trained_under():
    space = PlanSpace(ranks=4, rows=8, source=4, target=4)
    request = PlanRequest(
        name="tiny", model=setup(EXPERTS).run.model, space=space, trainable=FORECAST["SpIEL"]
    )
    machine = find_machine("h100")
    limits = machine_limits(machine, ranks=4)
    found = find_plans(request, machine=machine, limits=limits)
    configs = [each.choice.parallel_config(request.parallel) for each in found.best]
    assert configs
    for each in configs:
        assert not list(request.trainable.parallel_problems(each.plan, memory=each.memory))
    sharded = request.replace(space=space.replace(zero=(3,)))
    with pytest.raises(ConfigError, match=r"trainable=SpIEL under parallel\.plan\.zero=3"):
        find_plans(sharded, machine=machine, limits=limits)
