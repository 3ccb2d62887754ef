"""Memory tiers of a trainer: the stores that a memory plan asks for, given to its parts."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from moesaic.core.shapes import Int, Tensor
from moesaic.distributed.world import local_tensor
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.memory.tensor_store import TensorStore
from moesaic.memory.tier import HostMemory, Tier
from moesaic.moe.experts import ExpertModule
from moesaic.moe.layer import MoELayer
from moesaic.nn.adapter import is_of_adapter
from moesaic.optim.gradients import TieredGradients
from moesaic.optim.late_updates import ExpertBank, LateUpdates
from moesaic.optim.named_optimizer import NamedOptimizer
from moesaic.optim.run_ahead import RunAhead, all_overwritten_bytes
from moesaic.optim.tiered_states import TieredStates
from moesaic.parallel.parallel_model import ParallelModel


def use_memory_plan(
    plan: MemoryPlan, *, optimizer: NamedOptimizer, model: ParallelModel
) -> RunAhead:
    """Keep gradients and optimizer states on the tiers of ``plan`` from now on.

    Returns the updates that run ahead of the gradient norm.
    """

    def opened(tier: Tier, purpose: str) -> TensorStore:
        label = f"rank{model.mesh.rank}-{purpose}"
        device, in_flight = model.mesh.device, plan.in_flight_bytes
        return tier.open(device=device, label=label, in_flight_bytes=in_flight)

    banks = {name: (module, p) for name, module, p in _expert_banks(model) if plan.late_steps}
    if not plan.gradients.is_device:
        model.gradients = TieredGradients(
            opened(plan.gradients, "gradients"),
            model.model.named_parameters(),
            dtype=model.precision.gradient_dtype,
            banks=banks,
        )
    optimizer.gradients = model.gradients
    stream = model.parameter_stream
    optimizer.updated_weights.tier = stream.store if stream else None
    if plan.optimizer_states.is_device:
        return RunAhead(optimizer, memory=torch.empty(0, dtype=torch.uint8))
    optimizer.tier = TieredStates(
        opened(plan.optimizer_states, "optimizer-states"), plan.in_flight_bytes
    )
    late: dict[ExpertModule, list[ExpertBank]] = {}
    for group in optimizer.param_groups:
        for name in group["param_names"]:
            if name in banks and _can_be_late(name, group, optimizer=optimizer, model=model):
                module, parameter = banks[name]
                resting = None if stream is None else stream.resting(name)
                bank = ExpertBank(name, parameter, group["name"], resting)
                late.setdefault(module, []).append(bank)
    optimizer.late = LateUpdates(
        [bank for each in late.values() for bank in each], max_steps=plan.late_steps
    )
    for module, each in late.items():
        module.call_before_use(partial(_catch_up, optimizer, each))
    return _run_ahead(plan, optimizer=optimizer, model=model)


def _run_ahead(plan: MemoryPlan, *, optimizer: NamedOptimizer, model: ParallelModel) -> RunAhead:
    size = min(plan.run_ahead_bytes, all_overwritten_bytes(optimizer))
    kept = HostMemory().open(device=model.mesh.device, label=f"rank{model.mesh.rank}-overwritten")
    kept.allocate("values", (size,), torch.uint8)
    ahead = RunAhead(optimizer, memory=kept.live("values"))
    if ahead.num_bytes:
        model.when_complete(ahead.start)
    return ahead


def _expert_banks(model: ParallelModel) -> Iterator[tuple[str, ExpertModule, nn.Parameter]]:
    """Yield weights ``[E, M, N]`` whose experts this rank reads by themselves, and their module."""
    for path, layer in model.model.named_modules():
        if not isinstance(layer, MoELayer):
            continue
        for name, parameter in layer.experts.named_parameters(prefix=f"{path}.experts"):
            whole = parameter.ndim == 3 and local_tensor(parameter) is parameter
            if whole and not is_of_adapter(name):
                yield name, layer.experts, parameter


def _can_be_late(
    name: str, group: dict[str, Any], *, optimizer: NamedOptimizer, model: ParallelModel
) -> bool:
    """Whether this rank can update single experts by itself, with the bits of the whole update."""
    placement, sync = model.sharding_plan[name], model.gradient_sync[name]
    sliced = [sharded.axis for sharded in placement.sharded_dims if sharded.dim]
    holders = model.mesh.size(*sliced, *sync.all_reduce_axes, num_experts=placement.num_experts)
    alone = group["rule"].elementwise or holders == 1
    narrow = model.precision.parameter_dtype.itemsize < 4
    return alone and (optimizer.master_weights.rounds_to_nearest or not narrow)


def _catch_up(
    optimizer: NamedOptimizer, banks: Sequence[ExpertBank], rows_per_expert: Int[Tensor, "E"]
) -> None:
    """Bring the weights of experts that have tokens up to date."""
    if not any(any(bank.missed_by_weights) for bank in banks):
        return
    used = [expert for expert, rows in enumerate(rows_per_expert.tolist()) if rows]
    for bank in banks:
        for expert in used:
            if bank.missed_by_weights[expert]:
                optimizer.catch_up_weights(bank, expert)
