import math
from collections import Counter

import pytest
from plan_cases import small_model

from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.model.parameter_flop_count import BatchDims
from moesaic.optim.optimizer import AdamW, EightBitStates, Muon
from moesaic.parallel.communication_volume import gradient_communication
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parameter_inventory import ParameterInventory
from moesaic.parallel.precision import Float32
from moesaic.parallel.trainable_parameters import AllParameters, MatchingParameters
from moesaic.planner.cost_settings import CostSettings
from moesaic.planner.state_bytes import PlanKey, ShardedState
from moesaic.planner.step_memory import state_bytes

INVENTORY = ParameterInventory(small_model())
PLANS = [
    ParallelPlan(data=8, expert=4),
    ParallelPlan(data=8, expert=4, zero=1),
    ParallelPlan(data=2, tensor=4, expert=2, expert_tensor=2, zero=2),
    ParallelPlan(data=4, context=2, expert=4, expert_tensor=2, zero=3),
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.acronym()}-{p.zero}-{p.tensor}")
@pytest.mark.parametrize(
    "optimizer",
    [AdamW(), Muon(), AdamW(states=EightBitStates(block=2))],
    ids=["adamw", "muon", "8-bit"],
)
def test_counted_classes_hold_the_values_of_every_parameter(plan: ParallelPlan, optimizer):
    state = ShardedState(INVENTORY, optimizer=optimizer, each=Float32())
    rank = INVENTORY.on_rank(ParallelConfig(plan=plan), world=8)
    values = sum(math.prod(shard.shape) for shard in rank.shards)
    key = PlanKey(*[getattr(plan, name) for name in PlanKey._fields])
    found = state.of_plan(key)
    assert found.values == values
    assert found.weights == found.gradients == 4 * values
    settings = CostSettings(model=small_model(), optimizer=optimizer, sizes=BatchDims(1, 1, 1))
    exact = state_bytes(rank, settings)
    assert abs(found.states - exact.states) <= exact.counters + len(rank.shards)
    assert state.values == sum(math.prod(p.placement.shape) for p in INVENTORY.parameters)


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.acronym()}-{p.zero}-{p.tensor}")
@pytest.mark.parametrize("pattern", ["", "experts", "attention"])
def test_counted_classes_sync_in_the_messages_of_every_parameter(plan: ParallelPlan, pattern: str):
    choice = MatchingParameters(patterns=(pattern,)) if pattern else AllParameters()
    inventory = ParameterInventory(small_model(), trainable=choice)
    rank = inventory.on_rank(ParallelConfig(plan=plan), world=8)
    state = ShardedState(inventory, optimizer=AdamW(), each=Float32())
    found = state.of_plan(PlanKey(*[getattr(plan, name) for name in PlanKey._fields]))
    assert found.trained == len(rank.trained)
    messages, sizes = Counter[str](), Counter[str]()
    for lines, times in ((found.synced_once, 1), (found.synced_often, 3)):
        for line in lines:
            messages[line.kind] += times * line.messages
            sizes[line.kind] += times * line.bytes
    for line in gradient_communication(rank, precision=Float32(), micro_batches=3):
        messages[line.kind] -= line.messages
        sizes[line.kind] -= line.bytes
    assert not any(messages.values())
    assert max(map(abs, sizes.values()), default=0) <= len(rank.shards)  # rounded by parameter
