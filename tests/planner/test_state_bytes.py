import math

import pytest
from plan_cases import small_model

from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.optim.optimizer import AdamW, Muon
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parameter_inventory import ParameterInventory
from moesaic.parallel.precision import Float32
from moesaic.planner.state_bytes import PlanKey, ShardedState

INVENTORY = ParameterInventory(small_model())
PLANS = [
    ParallelPlan(data=8, expert=4),
    ParallelPlan(data=8, expert=4, zero=1),
    ParallelPlan(data=2, tensor=4, expert=2, expert_tensor=2, zero=2),
    ParallelPlan(data=4, context=2, expert=4, expert_tensor=2, zero=3),
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.acronym()}-{p.zero}-{p.tensor}")
@pytest.mark.parametrize("optimizer", [AdamW(), Muon()], ids=["adamw", "muon"])
def test_counted_classes_hold_the_values_of_every_parameter(plan: ParallelPlan, optimizer):
    state = ShardedState(INVENTORY, optimizer=optimizer, each=Float32())
    rank = INVENTORY.on_rank(ParallelConfig(plan=plan), world=8)
    values = sum(math.prod(shard.shape) for shard in rank.shards)
    key = PlanKey(*[getattr(plan, name) for name in PlanKey._fields])
    found = state.of_plan(key)
    assert found.values == values
    assert found.weights == found.gradients == 4 * values
    assert state.values == sum(math.prod(p.placement.shape) for p in INVENTORY.parameters)
