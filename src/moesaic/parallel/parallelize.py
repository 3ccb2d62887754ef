"""Parallelize: turn a whole model into one rank's part under a plan, in the order that works.

Remove the blocks of other pipeline stages, shard parameters, replace the parts of layers that
communicate, checkpoint activations, and last let ZeRO shard the remaining copies.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn

from moesaic.core.errors import ConfigError
from moesaic.distributed.mesh import STAGE_AXES, Mesh
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.distributed.world import World
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.memory.tensor_store import TensorStore
from moesaic.model.config import ModelConfig
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE, SparseLayer
from moesaic.moe.expert_capacity import Limit
from moesaic.moe.expert_selection import Select
from moesaic.moe.experts import GroupedExperts
from moesaic.moe.layer import MoELayer, moe_layers
from moesaic.nn.initializer import Allocate, allocate_parameters
from moesaic.nn.shardable_module import shardable_modules
from moesaic.parallel.activation_offload import offload_activations
from moesaic.parallel.batch_ranks import BatchRanks, world_over
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.context_parallel import ContextRanks, SequenceSharder
from moesaic.parallel.expert_dispatch import DispatchGroups
from moesaic.parallel.parallel_model import ParallelModel
from moesaic.parallel.parameter_streaming import ParameterStream
from moesaic.parallel.partial_forward import BlockRange
from moesaic.parallel.pipeline import Pipeline
from moesaic.parallel.plan_problems import memory_problems
from moesaic.parallel.precision import Float32, Precision, set_gradient_dtype
from moesaic.parallel.sharding_plan import (
    GradientSync,
    ShardingPlan,
    local_spans,
    make_sharding_plan,
    slice_local,
)
from moesaic.parallel.tensor_parallel import apply_tensor_parallel, tensor_parallel_problems
from moesaic.parallel.weight_start import allocate_by_plan
from moesaic.parallel.zero import apply_zero

TierPurpose = Literal["parameters", "activations"]


def parallelize(
    model: Transformer,
    *,
    parallel: ParallelConfig,
    world: World,
    precision: Precision | None = None,
    timeout_s: float = 120.0,
) -> ParallelModel:
    """Parallelize a whole model, identical on every rank of ``world``, in place. Collective.

    A model without values (``Transformer.without_values``) gets memory for this rank's shards, to
    be filled (``weight_start.py``); of another the values are kept.
    ``precision`` (by default float32) has the dtypes of parameters and gradients.
    Raises ConfigError where the plan does not fit the number of ranks or the model.
    """
    mesh = Mesh(
        parallel.plan.resolve(world.size),
        rank=world.rank,
        device=world.device,
        expert_counts=expert_counts(model),
        timeout_s=timeout_s,
    )
    return parallelize_on_mesh(model, parallel=parallel, mesh=mesh, precision=precision)


def parallelize_on_mesh(
    model: Transformer,
    *,
    parallel: ParallelConfig,
    mesh: Mesh,
    precision: Precision | None = None,
    allocate: Allocate | None = None,
) -> ParallelModel:
    """Parallelize a whole model over the ranks of a mesh (see ``parallelize``). Collective.

    ``allocate`` returns the memory of a shard of a model without any; by default on its tier.
    """
    check_parallel(model, parallel=parallel, plan=mesh.plan)
    precision = precision or Float32()
    stages = parallel.pipeline_stages(model.config) if mesh.plan.pipe > 1 else None
    full_plan = make_sharding_plan(model)
    if stages is not None:
        stages.remove_other_stages(model, rank=mesh.coordinates()["pipe"])
    local_plan = {name: full_plan[name] for name, _ in model.named_parameters()}
    dtype = precision.parameter_dtype
    shard_parameters(model, sharding_plan=local_plan, mesh=mesh, dtype=dtype)
    apply_tensor_parallel(model, group=mesh.group("tensor"), vocab_size=model.config.vocab_size)
    apply_context_parallel(model, parallel=parallel, mesh=mesh)
    apply_expert_parallel(model, parallel=parallel, mesh=mesh)
    model.head.data_ranks = mesh.group("data")
    parallel.activation_checkpointing.apply(model)
    if not parallel.memory.activations.is_device:
        store = open_tier(parallel.memory, "activations", mesh=mesh)
        offload_activations(model, store=store)
    sync = {name: GradientSync(each.replicated_axes) for name, each in local_plan.items()}
    if mesh.plan.zero:
        sync = apply_zero(
            model, mesh=mesh, precision=precision, gradient_sync=sync, sharding_plan=local_plan
        )
    memory = parallel.memory
    stream = None
    if not memory.parameters.is_device:
        store = open_tier(memory, "parameters", mesh=mesh)
        experts = {name for name, each in local_plan.items() if each.num_experts is not None}
        ranges = [BlockRange.all_blocks(model.config)]
        if stages is not None:
            ranges = stages.ranges_of_rank(mesh.coordinates()["pipe"])
        stream = ParameterStream(model, store=store, experts=experts, stages=ranges)
    if any(parameter.is_meta for parameter in model.parameters()):
        hook = allocate or allocate_by_plan(mesh.device, stream=stream)
        allocate_parameters(model, allocate=hook, device=mesh.device)
    set_gradient_dtype(model, precision)
    pipeline = stages and Pipeline(model, mesh=mesh, stages=stages, splits_backward=stream is None)
    parallel_model = ParallelModel(
        model,
        mesh=mesh,
        precision=precision,
        sharding_plan=full_plan,
        gradient_sync=sync,
        pipeline=pipeline,
    )
    if stream is not None:
        stream.move_to_tier()
        parallel_model.parameter_stream = stream
    return parallel_model


def open_tier(memory: MemoryPlan, purpose: TierPurpose, *, mesh: Mesh) -> TensorStore:
    """Return this rank's store of what a memory plan keeps on a tier."""
    tiers = {"parameters": memory.parameters, "activations": memory.activations}
    return tiers[purpose].open(
        device=mesh.device,
        label=f"rank{mesh.rank}-{purpose}",
        in_flight_bytes=memory.in_flight_bytes,
    )


def shard_parameters(
    model: nn.Module,
    *,
    sharding_plan: ShardingPlan,
    mesh: Mesh,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Replace every parameter by this rank's slice of it, rounded to ``dtype``."""
    local: dict[nn.Parameter, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            placement = sharding_plan.get(f"{path}.{name}" if path else name)
            if parameter not in local and placement is not None:
                experts = placement.num_experts
                spans = local_spans(
                    placement, grid=mesh.grid(experts), coordinates=mesh.coordinates(experts)
                )
                part = slice_local(parameter.detach(), spans).to(dtype)
                same = part.shape == parameter.shape and part.dtype == parameter.dtype
                local[parameter] = parameter if same else nn.Parameter(part)
            module.register_parameter(name, local[parameter])


def apply_context_parallel(model: Transformer, *, parallel: ParallelConfig, mesh: Mesh) -> None:
    """Shard token streams over context and tensor ranks, and attend over context ranks."""
    plan, coordinates = mesh.plan, mesh.coordinates()
    ranks = plan.context * plan.tensor
    if ranks == 1:
        return
    model.sequence_sharding = SequenceSharder(
        coordinates["context"] * plan.tensor + coordinates["tensor"],
        ranks,
        tensor_ranks=plan.tensor,
        token_split=parallel.context_parallel.token_split(),
    )
    group = mesh.group("context")
    if group is not None:
        scope = ContextRanks(group, parallel.context_parallel)
        for _, module in shardable_modules(model):
            module.use_context_parallel(scope)


def apply_expert_parallel(model: Transformer, *, parallel: ParallelConfig, mesh: Mesh) -> None:
    """Sum routing statistics over the batch's ranks, and dispatch tokens over expert ranks."""
    stage, rows = world_over(mesh, *STAGE_AXES), world_over(mesh, "context", "tensor")
    scope = parallel.capacity_scope
    for layer in moe_layers(model):
        number = layer.router.config.experts
        experts = number if scope.of_experts else None
        capacity = world_over(mesh, *scope.axes, num_experts=experts)
        layer.batch_group = BatchRanks(stage, row_world=rows, capacity_world=capacity, scope=scope)
        expert, expert_tensor = (
            mesh.group(axis, num_experts=number) for axis in ("expert", "expert_tensor")
        )
        if isinstance(layer.experts, GroupedExperts) and layer.experts.adapter is not None:
            rank = mesh.coordinates(number)["expert"]
            layer.experts.adapter.first_expert = rank * len(layer.experts.up)
        if expert is not None or expert_tensor is not None:
            groups = DispatchGroups(expert, expert_tensor, mesh.timeout_s)
            layer.dispatcher = parallel.dispatch.build(groups)


def expert_counts(model: nn.Module) -> tuple[int, ...]:
    """Return the different numbers of experts of a model's layers, for its ``Mesh``."""
    return tuple(sorted({layer.router.config.experts for layer in moe_layers(model)}))


def check_parallel(model: Transformer, *, parallel: ParallelConfig, plan: ParallelPlan) -> None:
    """Raise ConfigError with a sentence for each layer and method that the plan does not fit."""
    problems = [
        *tensor_parallel_problems(model, ranks=plan.tensor),
        *_context_parallel_problems(model, parallel=parallel, plan=plan),
        *whole_row_problems(model.config, ranks=plan.context * plan.tensor),
        *_head_problems(model.config, ranks=plan.context * plan.tensor),
    ]
    for layer in moe_layers(model):
        plan.expert_ranks(layer.router.config.experts, layer=layer.name)
        if why := parallel.dispatch.problems(layer, plan=plan):
            dispatch = type(parallel.dispatch).__name__
            problems.append(f"parallel.dispatch={dispatch} of {layer.name}: {why}")
        if plan.expert_tensor > 1:
            problems += _expert_tensor_problems(layer, ranks=plan.expert_tensor)
    problems += memory_problems(parallel.memory, plan=plan, expert_counts=expert_counts(model))
    if problems:
        raise ConfigError(problems)


def _context_parallel_problems(
    model: nn.Module, *, parallel: ParallelConfig, plan: ParallelPlan
) -> Iterator[str]:
    """Yield a sentence for each module whose rows the context ranks cannot share."""
    heads: set[int] = set()
    for path, module in shardable_modules(model) if plan.context > 1 else ():
        sharding, kind = module.context_sharding(), type(module).__name__
        if sharding.refusal is not None:
            yield (
                f"parallel.context={plan.context}: {kind} of {path} {sharding.refusal}: set "
                "context to 1, or choose another mixer (model.mixers)"
            )
        elif sharding.heads is not None:
            heads.add(sharding.heads // plan.tensor)
    for number in sorted(heads):
        if why := parallel.context_parallel.problems(heads=number, ranks=plan.context):
            yield f"parallel.context={plan.context}: {why}"


def _expert_tensor_problems(layer: MoELayer, *, ranks: int) -> Iterator[str]:
    experts, name = layer.experts, layer.name
    if not isinstance(experts, GroupedExperts):
        kind = type(experts).__name__
        yield f"parallel.expert_tensor={ranks}: {kind} of {name} have no hidden width to shard"
    elif experts.bias:
        yield (
            f"parallel.expert_tensor={ranks} with the biases of {name}: every slice would add "
            "them; set model.bias to false, or expert_tensor to 1"
        )
    elif (hidden := experts.down.shape[1]) % ranks:
        yield f"parallel.expert_tensor={ranks} must divide the {hidden} channels of {name}"


def _head_problems(config: ModelConfig, *, ranks: int) -> Iterator[str]:
    """Yield a sentence if the head reads whole rows and ``ranks`` share them."""
    if ranks > 1 and config.head.needs_whole_rows:
        name = type(config.head).__name__
        yield (
            f"parallel.plan: {name} reads one vector of each row, but context x tensor = {ranks} "
            "ranks share each row: set context and tensor to 1 (data, expert and pipe are free)"
        )


def whole_row_problems(config: ModelConfig, *, ranks: int) -> Iterator[str]:
    """Yield a sentence for each stack whose routing needs whole rows, if ``ranks`` share them."""
    if ranks == 1:
        return
    for side, stack in (("encoder", config.encoder), ("decoder", config.decoder)):
        moe = config.moe_of_stack(stack)
        if stack.moe_layers and moe.needs_whole_rows:
            rule = type(_reads_rows(moe)).__name__
            yield (
                f"parallel.plan: {rule} of the {side} compares the tokens of a row, but "
                f"context x tensor = {ranks} ranks share each row: set context and tensor to 1 "
                "(data, expert and pipe are free), or choose another rule"
            )


def _reads_rows(moe: SparseLayer) -> SparseLayer | Select | Limit:
    if not isinstance(moe, MoE):
        return moe
    return moe.limit if moe.limit.needs_whole_rows else moe.select
