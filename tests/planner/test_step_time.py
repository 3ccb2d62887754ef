from dataclasses import replace
from typing import Any

import pytest
from plan_cases import hand_made_step

from moesaic.distributed.parallel_plan import ParallelPlan, RankGrid
from moesaic.parallel.communication_volume import CommunicationVolume
from moesaic.planner.cost_entries import DEVICE, DISK, HOST, MovedBytes, Purpose, StepCost
from moesaic.planner.machine import Machine, SharedCores, SizedRate, SlowDown, find_machine
from moesaic.planner.step_time import group_shape, sent_seconds, step_sums, step_time, together

H100 = find_machine("h100")
PLAN = ParallelPlan(data=4, tensor=2, expert=4).resolve(8)


def _step(**parts: Any) -> StepCost:
    return replace(hand_made_step(), **parts)


def _shared_cores(**curves: SizedRate) -> Machine:
    """Return a machine whose ranks share cores: a collective takes 1 ms, a unit of ZeRO 2 ms."""

    def curve(seconds: float) -> SizedRate:
        return SizedRate(points=((1e9, 1e9 / seconds),), source="made up")

    kinds = {name: curve(1e-3) for name in ("all_to_all", "all_gather", "all_reduce")}
    units = {name: curve(2e-3) for name in ("unit_gather", "unit_scatter")}
    shared = SharedCores(**{**kinds, **units, "memory": H100.memory, **curves})
    return H100.replace(shared_cores=shared)


@pytest.mark.parametrize("axis", ["data", "tensor", "data+context", "stage", "expert", "pipe"])
@pytest.mark.parametrize("node", [1, 4, 8])
def test_the_ranks_of_a_group_on_one_node_are_those_of_its_rank_numbers(axis: str, node: int):
    plan = ParallelPlan(pipe=2, data=4, context=2, tensor=2, expert=8, expert_tensor=2).resolve(32)
    names = {"stage": ("data", "context", "tensor")}.get(axis, tuple(axis.split("+")))
    axes = plan.axes() if axis != "expert" else plan.axes(num_experts=8)
    group = RankGrid(axes).group(0, names)
    found = group_shape(plan, axis, devices_per_node=node)
    assert found.ranks == len(group)
    assert found.local == sum(rank < node for rank in group)


def test_equal_pieces_take_the_slow_down_of_their_pair_and_a_short_one_a_share_of_it():
    assert together(2.0, 2.0, slow_down=1.5) == 3.0
    assert together(2.0, 0.0, slow_down=1.5) == 2.0
    assert together(2.0, 1.0, slow_down=1.0) == 2.0


def test_gradient_sums_hide_under_compute_and_exchanges_between_layers_do_not():
    alone = step_time(_step(), machine=H100, plan=PLAN)
    size = int(0.5 * alone.total * H100.within_node.bytes_per_s.value)
    hidden, last, waited = (
        step_time(_step(**lines), machine=H100, plan=PLAN)
        for lines in (
            {"synced": (CommunicationVolume("reduce-scatter", "data", size, 20),)},
            {"synced": (CommunicationVolume("reduce-scatter", "data", size, 1),)},
            {"exchanged": (CommunicationVolume("all-to-all", "expert", size),)},
        )
    )
    assert alone.total < hidden.total < 1.2 * alone.total
    assert waited.total > 1.45 * alone.total
    assert last.total > 1.45 * alone.total  # of one sum all gradients are there at the end


def test_where_ranks_share_cores_each_call_takes_what_it_was_measured_to_take():
    machine, plan = _shared_cores(), ParallelPlan(data=2, zero=3).resolve(2)
    alone = step_time(_step(), machine=machine, plan=plan).total
    for lines, milliseconds in (
        ({"exchanged": (CommunicationVolume("all-to-all", "data", 1000, 3),)}, 3),
        ({"synced": (CommunicationVolume("all-reduce", "data", 1000, 5),)}, 5),
        ({"synced": (CommunicationVolume("all-gather", "data", 1000, 4),)}, 8),
        ({"synced": (CommunicationVolume("reduce-scatter", "data", 1000, 2),)}, 4),
    ):
        found = step_time(_step(**lines), machine=machine, plan=plan)
        assert found.total - alone == pytest.approx(1e-3 * milliseconds)


def test_operands_from_memory_are_slower_beside_busy_ranks_that_share_cores():
    slow = H100.memory.replace(points=tuple((s, r / 3) for s, r in H100.memory.points))
    machine = _shared_cores(memory=slow)
    pairs = machine.contended.replace(all_devices=SlowDown(value=1.2, source="made up"))
    machine = machine.replace(contended=pairs)
    plans = (ParallelPlan().resolve(1), ParallelPlan(data=2).resolve(2))
    one, two = (step_time(_step(), machine=machine, plan=plan).compute for plan in plans)
    # the factor, of what neighbours cost beside the curve, is of all compute
    assert two["memory-bound"] == pytest.approx(1.2 * 3 * one["memory-bound"])
    assert two["dense product"] == pytest.approx(1.2 * one["dense product"])


def test_what_a_step_takes_over_its_parts_is_a_factor_of_what_waits_for_memory_alone():
    over = H100.replace(step_over_parts=SlowDown(value=1.25, source="made up"))
    step = _step(exchanged=(CommunicationVolume("all-to-all", "expert", 10**9, 1),))
    plain, longer = (step_time(step, machine=machine, plan=PLAN) for machine in (H100, over))
    for kind, factor in (("dense product", 1), ("memory-bound", 1.25)):
        assert longer.compute[kind] == pytest.approx(factor * plain.compute[kind])
    assert longer.communication == plain.communication


def test_copies_between_tiers_are_waited_for_where_compute_does_not_cover_them():
    alone = step_time(_step(), machine=H100, plan=PLAN)
    few, many = (int(n * alone.total * H100.host_to_device.bytes_per_s.value) for n in (0.5, 10))
    covered, bound = (
        step_time(
            _step(moved=(MovedBytes(HOST, DEVICE, Purpose.WEIGHTS, size),)), machine=H100, plan=PLAN
        )
        for size in (few, many)
    )
    assert covered.total < 1.1 * alone.total
    assert bound.total == pytest.approx(10 * alone.total, rel=0.1)
    disk = (MovedBytes(DISK, HOST, Purpose.STATES, many),)
    assert step_time(_step(moved=disk), machine=H100, plan=PLAN).total > bound.total


def test_a_bubble_is_its_share_of_the_whole_step():
    alone = step_time(_step(), machine=H100, plan=PLAN)
    piped = step_time(_step(bubble=0.25), machine=H100, plan=PLAN)
    assert piped.total == pytest.approx(alone.total / 0.75)


def test_a_group_across_nodes_sends_over_the_slow_link():
    inside = group_shape(PLAN, "expert", devices_per_node=8)
    across = group_shape(PLAN, "expert", devices_per_node=2)
    line = CommunicationVolume("all-to-all", "expert", 10**9, 1)
    fast, slow = (sent_seconds(line, shape=shape, machine=H100) for shape in (inside, across))
    rate = H100.between_nodes.bytes_per_s.value
    assert slow == pytest.approx(1e9 * (4 - across.local) / 3 / rate, rel=0.01)
    assert fast < slow


def test_sums_of_numbers_add_to_other_sums_over_the_same_ranks():
    machine, plan = _shared_cores(), ParallelPlan(data=2).resolve(2)
    alone = step_time(_step(), machine=machine, plan=plan).total
    lines = (CommunicationVolume("all-reduce", "data", 1000, 3),)
    found = step_time(_step(exchanged=lines), machine=machine, plan=plan)
    assert found.communication["all-reduce data"] == pytest.approx(4e-3)
    assert found.total - alone == pytest.approx(3e-3)


def test_all_ranks_sum_the_norm_where_one_lacks_parameters():
    plans = (ParallelPlan(data=2), ParallelPlan(data=1, tensor=2), ParallelPlan(data=2, zero=1))
    found = [[line.axis for line in step_sums(plan)] for plan in plans]
    every = "pipe+data+context+tensor"
    assert found == [["data"], [every], ["data", every]]
