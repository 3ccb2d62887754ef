"""The plan model beside the cost of whole steps: two forecasts of the same plans."""

from dataclasses import replace

import pytest
from plan_cases import TOKENS, small_model, small_plan_model, small_space

from moesaic.memory.memory_plan import MemoryPlan
from moesaic.memory.tier import HostMemory
from moesaic.model.parameter_flop_count import BatchDims
from moesaic.parallel.config import ParallelConfig
from moesaic.planner.cost_entries import (
    DEVICE,
    Purpose,
    StepCost,
    accumulation,
    gradient_operations,
)
from moesaic.planner.cost_settings import CostSettings
from moesaic.planner.machine import find_machine
from moesaic.planner.operation_recorder import OperationKind
from moesaic.planner.plan_model import MORE_ROWS, PlanModel
from moesaic.planner.plan_space import RESIDENT, CompletePlan, Degrees, Option
from moesaic.planner.step_cost import step_cost
from moesaic.planner.step_time import compute_seconds, step_time

MACHINE = find_machine("cpu-2-cores")
SPACE = small_space(2)


def _plan(*, rows: int, micro_batches: int, zero: int = 0) -> CompletePlan:
    """Return a plan of two data ranks."""
    option = Option(zero, RESIDENT, SPACE.checkpointing[0])  # pyright: ignore[reportArgumentType]
    return CompletePlan(Degrees(1, 2, 1, 1, 1, 1, rows, micro_batches), option)


def _cost(choice: CompletePlan) -> StepCost:
    settings = CostSettings(
        model=small_model(),
        parallel=choice.parallel_config(ParallelConfig()),
        sizes=SPACE.micro_batch(choice.degrees.rows),
        micro_batches=choice.degrees.micro_batches,
        world=2,
        device="cpu",
    )
    return step_cost(settings)


@pytest.fixture(scope="module")
def measured() -> PlanModel:
    """The plan model of one measured step of one row."""
    sizes = BatchDims(rows=1, source=0, target=TOKENS)
    one_row = CostSettings(model=small_model(), sizes=sizes, device="cpu")
    more_rows = one_row.replace(sizes=replace(sizes, rows=MORE_ROWS))
    settings = replace(
        small_plan_model(SPACE, machine=MACHINE).settings,
        reference=step_cost(one_row),
        more_rows=step_cost(more_rows).operations,
    )
    return PlanModel(settings, SPACE)


@pytest.mark.parametrize(("rows", "micro_batches"), [(8, 1), (2, 4)])
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_a_plan_takes_what_its_whole_step_takes(
    measured: PlanModel, zero: int, rows: int, micro_batches: int
):
    """What is sent and the update to 1 %; compute, of measured operations scaled, to 7 %."""
    choice = _plan(rows=rows, micro_batches=micro_batches, zero=zero)
    found = measured.forecast(choice).time
    whole = step_time(_cost(choice), machine=MACHINE, plan=choice.plan, num_experts=4)
    for mine, theirs, bound in (
        (sum(found.communication.values()), sum(whole.communication.values()), 0.01),
        (found.update, whole.update, 0.01),
        (sum(found.compute.values()), sum(whole.compute.values()), 0.07),
    ):
        assert mine == pytest.approx(theirs, rel=bound)


def test_gradients_are_summed_into_their_norm_once_a_step_and_added_up_in_later_micro_batches(
    measured: PlanModel,
):
    one, two = (
        measured.forecast(_plan(rows=4, micro_batches=m)).time.compute["memory-bound"]
        for m in (1, 2)
    )
    cost = _cost(_plan(rows=4, micro_batches=1))
    trained = len(measured.settings.inventory.parameters)
    gradients = cost.held_bytes(purpose=Purpose.GRADIENTS)
    added = accumulation(gradients=gradients, trained=trained, times=1)
    machine = MACHINE.beside_busy_ranks()
    factor = MACHINE.compute_factor(OperationKind.MEMORY, neighbours=True)
    once, later = (
        factor * sum(compute_seconds(each, machine=machine).values())
        for each in (cost.gradient_operations, added)
    )
    assert 2 * one - two == pytest.approx(once - later, rel=0.01)


@pytest.mark.parametrize("rows", [1, 8])
def test_passes_over_gradients_take_a_ranks_share_of_weights_at_any_number_of_rows(rows: int):
    """Half of many experts with few rows each: compute to 10 %; dispatch copies are left out."""
    model = small_model(experts=64)
    sizes = SPACE.micro_batch(1)
    one_row = CostSettings(model=model, sizes=sizes, device="cpu")
    more_rows = one_row.replace(sizes=SPACE.micro_batch(MORE_ROWS))
    settings = replace(
        small_plan_model(SPACE, machine=MACHINE, experts=64).settings,
        reference=step_cost(one_row),
        more_rows=step_cost(more_rows).operations,
    )
    option = Option(0, RESIDENT, SPACE.checkpointing[0])
    choice = CompletePlan(Degrees(1, 2, 1, 1, 2, 1, rows, 2), option)
    found = PlanModel(settings, SPACE).forecast(choice).time.compute
    whole = step_cost(
        one_row.replace(
            parallel=choice.parallel_config(ParallelConfig()),
            sizes=SPACE.micro_batch(rows),
            micro_batches=2,
            world=2,
        )
    )
    expected = step_time(whole, machine=MACHINE, plan=choice.plan, num_experts=64).compute
    assert sum(found.values()) == pytest.approx(sum(expected.values()), rel=0.1)


def test_each_stage_of_a_pipeline_has_the_units_in_use_of_a_tier_of_parameters():
    """The largest stage holds what its whole step does, to 2 %: the table is on one stage."""
    memory = MemoryPlan(parameters=HostMemory())
    option = Option(0, memory, SPACE.checkpointing[0])  # pyright: ignore[reportArgumentType]
    choice = CompletePlan(Degrees(2, 1, 1, 1, 1, 1, 1, 4), option)
    found = small_plan_model(SPACE, machine=MACHINE).held(choice.degrees, option)
    whole = _cost(choice).held_bytes(tier=DEVICE, purpose=Purpose.WEIGHTS)
    assert found[DEVICE, Purpose.WEIGHTS] == pytest.approx(whole, rel=0.02)


def test_no_norm_is_taken_of_frozen_parameters_and_clipping_scales_the_others():
    assert not gradient_operations(gradients=0, trained=0, buckets={})
    *_, norms, scaled = gradient_operations(gradients=4 * 30, trained=3, buckets={120: 1})
    assert (norms.count, norms.bytes_read, norms.bytes_written) == (3, 40, 0)
    assert (scaled.count, scaled.bytes_read, scaled.bytes_written) == (3, 40, 40)
