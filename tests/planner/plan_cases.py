"""A tiny model, a hand-made step of it, and machines, for the planner's tests."""

from typing import Any

from moesaic.model.config import ModelConfig, Stack
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.optim.optimizer import AdamW
from moesaic.parallel.communication_volume import CommunicationVolume
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parameter_inventory import ParameterInventory
from moesaic.parallel.precision import Float32
from moesaic.planner.cost_entries import DEVICE, HeldBytes, OperationCost, Phase, Purpose, StepCost
from moesaic.planner.machine import Machine, find_machine
from moesaic.planner.operation_recorder import OperationKind
from moesaic.planner.plan_model import EXCHANGES, PlanModel, PlanModelSettings
from moesaic.planner.plan_space import PlanSpace
from moesaic.planner.state_bytes import ShardedState

LAYERS, DIM, TOKENS = 4, 64, 32


def small_model(*, experts: int = 4) -> ModelConfig:
    """Return a decoder of four layers of experts."""
    return ModelConfig(
        vocab_size=64,
        dim=DIM,
        encoder=Stack(layers=0),
        decoder=Stack(layers=LAYERS, moe_every=1),
        attention=AttentionConfig(heads=4),
        feed_forward=FeedForwardConfig(hidden=128),
        moe=MoE(experts=experts, select=TopK(k=2)),
    )


def hand_made_step() -> StepCost:
    """Return the cost of a step of one row as a rank alone has it, in round numbers."""
    kinds = (
        (OperationKind.DENSE_PRODUCT, 4, 2 * TOKENS * DIM * DIM),
        (OperationKind.GROUPED_PRODUCT, 1, 2 * 2 * TOKENS * 2 * DIM * 128),
        (OperationKind.ATTENTION, 1, 4 * TOKENS * TOKENS * DIM),
        (OperationKind.MEMORY, 20, 0),
    )
    operations = [
        OperationCost(
            phase, kind, "float32", flops, 4 * TOKENS * DIM, 4 * TOKENS * DIM, passes * n * LAYERS
        )
        for phase, passes in ((Phase.FORWARD, 1), (Phase.BACKWARD, 2))
        for kind, n, flops in kinds
    ]
    saved = HeldBytes(DEVICE, Purpose.ACTIVATIONS, 4 * TOKENS * DIM * 20 * LAYERS)
    return StepCost(
        held=(saved,), peak={}, operations=tuple(operations), exchanged=(), synced=(), moved=()
    )


def small_space(ranks: int, **changes: Any) -> PlanSpace:
    """Return every plan of so many ranks for 16 rows."""
    return PlanSpace(ranks=ranks, rows=16, target=TOKENS, **changes)


def small_plan_model(
    space: PlanSpace, *, machine: Machine | None = None, experts: int = 4
) -> PlanModel:
    """Return the plan model of the hand-made step."""
    inventory = ParameterInventory(small_model(experts=experts))
    precision = Float32()
    settings = PlanModelSettings(
        inventory=inventory,
        reference=hand_made_step(),
        exchanges={axis: (CommunicationVolume("all-to-all", axis, 8192, 4),) for axis in EXCHANGES},
        machine=machine or find_machine("h100"),
        state=ShardedState(inventory, optimizer=AdamW(), each=precision),
        precision=precision,
        base=ParallelConfig(),
    )
    return PlanModel(settings, space)
