"""Memory tiers of a trainer: the stores that a memory plan asks for, given to its parts."""

from moesaic.memory.memory_plan import MemoryPlan
from moesaic.optim.gradients import TieredGradients
from moesaic.optim.named_optimizer import NamedOptimizer
from moesaic.optim.tiered_states import TieredStates
from moesaic.parallel.parallel_model import ParallelModel


def use_memory_plan(plan: MemoryPlan, *, optimizer: NamedOptimizer, model: ParallelModel) -> None:
    """Keep gradients and optimizer states on the tiers of ``plan`` from now on."""
    device, rank = model.mesh.device, model.mesh.rank
    if not plan.gradients.is_device:
        label = f"rank{rank}-gradients"
        store = plan.gradients.open(
            device=device, label=label, in_flight_bytes=plan.in_flight_bytes
        )
        model.gradients = TieredGradients(
            store, model.model.named_parameters(), dtype=model.precision.gradient_dtype
        )
    optimizer.gradients = model.gradients
    if not plan.optimizer_states.is_device:
        label = f"rank{rank}-optimizer-states"
        store = plan.optimizer_states.open(
            device=device, label=label, in_flight_bytes=plan.in_flight_bytes
        )
        optimizer.tier = TieredStates(store, plan.in_flight_bytes)
