"""The search certificate, by brute force: a search opens few plans, and no other is faster."""

import random
from collections.abc import Iterator

import pytest
from plan_cases import small_plan_model, small_space

from moesaic.planner.cost_entries import DEVICE, DISK, HOST
from moesaic.planner.machine import Machine, find_machine
from moesaic.planner.plan_forecast import Limits, PlanForecast
from moesaic.planner.plan_model import PlanModel
from moesaic.planner.plan_space import GRADIENTS_ON_HOST, RESIDENT, STREAMED, CompletePlan
from moesaic.planner.search import search

MB = 10**6
FEW_TIERS = (RESIDENT, GRADIENTS_ON_HOST, STREAMED)


def _slow_links(factor: float) -> Machine:
    machine = find_machine("h100")
    slow = machine.between_nodes.replace(
        bytes_per_s=machine.between_nodes.bytes_per_s.replace(value=5e10 / factor)
    )
    return machine.replace(
        between_nodes=slow,
        within_node=slow,
        devices_per_node=machine.devices_per_node.replace(value=4),
    )


def _all_forecasts(model: PlanModel) -> Iterator[PlanForecast]:
    for degrees in model.space.degrees(model.settings.inventory.config):
        for option in model.space.options():
            if model.bound_seconds(degrees) < float("inf"):
                yield model.forecast(CompletePlan(degrees, option))


@pytest.mark.parametrize("ranks", [1, 4, 8])
def test_no_plan_of_a_small_space_beats_the_one_that_is_found(ranks: int):
    draw = random.Random(ranks)
    space = small_space(ranks, max_micro_rows=2, memory=FEW_TIERS, zero=(0, 1, 3))
    model = small_plan_model(space, machine=_slow_links(10 ** draw.uniform(0, 3)))
    every = list(_all_forecasts(model))
    for found in every:  # what pruning relies on
        assert model.bound_seconds(found.choice.degrees) <= found.time.total
    for _ in range(6):
        sizes = {DEVICE: draw.uniform(0.3, 4) * MB, HOST: draw.choice([0, 9 * MB]), DISK: 9 * MB}
        limits = Limits(sizes)
        fitting = [f for f in every if limits.excess(f.by_tier)[0] <= 1]
        result = search(model, limits=limits, keep=3)
        assert result.certificate.holds
        if not fitting:
            assert not result.best
            ratio = min(limits.excess(f.by_tier)[0] for f in every)
            assert result.nearest is not None
            assert result.nearest.needed / max(1, result.nearest.allowed) == pytest.approx(ratio)
        else:
            fastest = min(f.time.total for f in fitting)
            assert result.best[0].time.total == pytest.approx(fastest, rel=1e-12)


def test_a_search_opens_a_small_part_of_a_large_space():
    space = small_space(8).replace(ranks=64, rows=1024)
    model = small_plan_model(space)
    result = search(model, limits=Limits({DEVICE: 80e9, HOST: 1e12, DISK: 1e12}), keep=1)
    assert result.certificate.holds
    assert result.certificate.opened < 0.2 * result.certificate.degrees
    assert result.certificate.evaluations < 0.2 * result.certificate.plans
