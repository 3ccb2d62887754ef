"""Memory tiers of a trainer: the stores that a memory plan asks for, given to its parts."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from moesaic.core.errors import ConfigError
from moesaic.core.shapes import Int, Tensor
from moesaic.distributed.world import local_tensor
from moesaic.memory.device_copies import device_copies
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.memory.named_copies import NamedCopies
from moesaic.memory.tensor_store import TensorStore
from moesaic.memory.tier import HostMemory, Tier
from moesaic.moe.layer import MoELayer
from moesaic.moe.router import RouterOutput
from moesaic.nn.adapter import is_of_adapter
from moesaic.optim.gradients import ResidentGradients, TieredGradients
from moesaic.optim.late_updates import ExpertBank, LateUpdates
from moesaic.optim.named_optimizer import NamedOptimizer
from moesaic.optim.run_ahead import RunAhead, all_overwritten_bytes
from moesaic.optim.tiered_states import TieredStates
from moesaic.parallel.parallel_model import ParallelModel
from moesaic.parallel.parameter_streaming import in_backward
from moesaic.parallel.zero import gather_again


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

    banks = {name: (layer, p) for name, layer, p in _expert_banks(model) if plan.late_steps}
    if not plan.gradients.is_device:
        model.gradients = TieredGradients(
            opened(plan.gradients, "gradients"),
            model.model.named_parameters(),
            dtype=model.precision.gradient_dtype,
            banks={name for name, (_, p) in banks.items() if len(local_tensor(p))},
        )
    stream = model.parameter_stream
    optimizer.weights.at_rest = frozenset(stream.names if stream else ())
    copies = device_copies(model.mesh.device, max_bytes=plan.in_flight_bytes)
    if copies is not None:
        optimizer.weights.copies = NamedCopies(copies)
        if plan.gradients.is_device:
            model.gradients = ResidentGradients(NamedCopies(copies))
    optimizer.gradients = model.gradients
    optimizer.updated_weights.tier = stream.store if stream else None
    if plan.optimizer_states.is_device:
        return RunAhead(optimizer, memory=torch.empty(0, dtype=torch.uint8))
    optimizer.tier = TieredStates(
        opened(plan.optimizer_states, "optimizer-states"), plan.in_flight_bytes
    )
    if banks:
        late = _late_banks(banks, optimizer=optimizer, model=model)
        optimizer.late = LateUpdates(
            [bank for each in late.values() for bank in each if bank.missed],
            max_steps=plan.late_steps,
        )
        for layer, each in late.items():
            _catch_up_before_use(layer, each, optimizer=optimizer, model=model)
    return _run_ahead(plan, optimizer=optimizer, model=model)


def _run_ahead(plan: MemoryPlan, *, optimizer: NamedOptimizer, model: ParallelModel) -> RunAhead:
    size = min(plan.run_ahead_bytes, all_overwritten_bytes(optimizer))
    kept = HostMemory().open(device=model.mesh.device, label=f"rank{model.mesh.rank}-overwritten")
    kept.allocate("values", (size,), torch.uint8)
    ahead = RunAhead(optimizer, memory=kept.live("values"))
    if ahead.num_bytes:
        model.when_complete(ahead.start)
    return ahead


def _expert_banks(model: ParallelModel) -> Iterator[tuple[str, MoELayer, nn.Parameter]]:
    """Yield weights ``[E, M, N]`` whose experts can be read by themselves, and their layer."""
    for path, layer in model.model.named_modules():
        if not isinstance(layer, MoELayer):
            continue
        for name, parameter in layer.experts.named_parameters(prefix=f"{path}.experts"):
            if parameter.ndim == 3 and not is_of_adapter(name):
                yield name, layer, parameter


def _late_banks(
    banks: Mapping[str, tuple[MoELayer, nn.Parameter]],
    *,
    optimizer: NamedOptimizer,
    model: ParallelModel,
) -> dict[MoELayer, list[ExpertBank]]:
    """Return the weights whose experts may be late, by layer. Raises ConfigError if none may."""
    stream = model.parameter_stream
    late: dict[MoELayer, list[ExpertBank]] = {}
    whys: list[str] = []
    for group in optimizer.param_groups:
        names: list[str] = [name for name in group["param_names"] if name in banks]
        for name in names:
            layer, parameter = banks[name]
            if why := _why_in_time(name, group, optimizer=optimizer, model=model):
                whys.append(f"{name}: {why}")
            else:
                resting = None if stream is None else stream.resting(name)
                bank = ExpertBank(name, parameter, group["name"], resting)
                late.setdefault(layer, []).append(bank)
    if not late:
        why = next(iter(whys), f"none of them is trained ({next(iter(banks))})")
        raise ConfigError(
            [f"parallel.memory.late_steps: no expert can be updated late. {why}: set it to 0"]
        )
    return late


def _why_in_time(
    name: str, group: dict[str, Any], *, optimizer: NamedOptimizer, model: ParallelModel
) -> str:
    """Return why this rank cannot update one expert with the bits of the whole update; else ''."""
    placement, sync = model.sharding_plan[name], model.gradient_sync[name]
    axes = [sharded.axis for sharded in placement.sharded_dims if sharded.dim]
    axes += [*sync.all_reduce_axes, *(sync.zero_axes if model.zero_dim(name) else ())]
    holders = model.mesh.size(*axes, num_experts=placement.num_experts)
    if not group["rule"].elementwise and holders > 1:
        return (
            f"{holders} ranks share the update of each matrix of {group['name']}; with "
            "parallel.plan.zero or expert each expert would be on one rank"
        )
    if (
        not optimizer.master_weights.rounds_to_nearest
        and model.precision.parameter_dtype.itemsize < 4
    ):
        return f"{type(optimizer.master_weights).__name__} rounds by the number of the step"
    return ""


def _catch_up_before_use(
    layer: MoELayer,
    banks: Sequence[ExpertBank],
    *,
    optimizer: NamedOptimizer,
    model: ParallelModel,
) -> None:
    """Have the weights of experts that get tokens brought up to date before they are read.

    Where ZeRO shards them, that is before they are gathered: an expert of this rank's shard may get
    the tokens of any rank. They are gathered in every forward pass, since others were late before.
    """
    if not any(model.gradient_sync[bank.name].zero_axes for bank in banks):
        layer.experts.call_before_use(partial(_catch_up, optimizer, banks))
        return
    spans = {bank.name: model.local_spans(bank.name)[0] for bank in banks}

    def before_gather(_module: nn.Module, _inputs: Any, routed: RouterOutput) -> None:
        if in_backward():  # a repeated pass uses the same experts
            return
        rows = layer.batch_group.sum(routed.routing.load())
        for bank in banks:
            own = [rows[first : first + number] for first, number in spans[bank.name]]
            _catch_up(optimizer, [bank], torch.cat([rows[:0], *own]))  # it may have none
        gather_again(layer.experts)

    layer.router.register_forward_hook(before_gather)


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
