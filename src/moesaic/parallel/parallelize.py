"""Apply: lay a model over the ranks of a mesh. The one place that knows the order.

Cut what axes cut, give layers the parts that know other ranks, say what is recomputed, and last
let ZeRO share out what is left.

Whole rows: which rules of a model compare the tokens of a row, and so cannot do with slices.
"""

from collections.abc import Iterator

from torch import nn

from moesaic.core.errors import ConfigError
from moesaic.distributed.mesh import STAGE_AXES, Mesh
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.distributed.world import World
from moesaic.model.config import ModelConfig
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE
from moesaic.moe.experts import GroupedExperts
from moesaic.moe.layer import moe_layers
from moesaic.nn.attention import CrossAttention, SelfAttention
from moesaic.parallel.activation_checkpointing import apply_activation_checkpointing
from moesaic.parallel.batch_ranks import BatchRanks, world_over
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.context_parallel import SequenceSharder
from moesaic.parallel.parallel_model import ParallelModel
from moesaic.parallel.pipeline import Pipeline
from moesaic.parallel.sharding_plan import (
    GradientSync,
    ShardingPlan,
    local_spans,
    make_sharding_plan,
    slice_local,
)
from moesaic.parallel.tensor_parallel import apply_tensor_parallel, tensor_parallel_problems
from moesaic.parallel.zero import apply_zero

EXPERT_STAGE_AXES = ("expert_data", "expert", "expert_tensor")


def parallelize(
    model: Transformer, *, parallel: ParallelConfig, world: World, timeout_s: float = 120.0
) -> ParallelModel:
    """Lay a whole model, alike on every rank, over the ranks of ``world``. Collective.

    The model itself becomes this rank's part. Raises ConfigError where the plan fits neither the
    number of ranks nor the model.
    """
    mesh = Mesh(
        parallel.plan.resolve(world.size),
        rank=world.rank,
        device=world.device,
        expert_counts=expert_counts(model),
        timeout_s=timeout_s,
    )
    return parallelize_on_mesh(model, parallel=parallel, mesh=mesh)


def parallelize_on_mesh(
    model: Transformer, *, parallel: ParallelConfig, mesh: Mesh
) -> ParallelModel:
    """Lay a whole model over the ranks of a mesh that is there (see ``parallelize``). Collective."""
    check_parallel(model, parallel=parallel, plan=mesh.plan)
    stages = parallel.pipeline_stages(model.config) if mesh.plan.pipe > 1 else None
    whole = make_sharding_plan(model)
    if stages is not None:
        stages.remove_other_stages(model, rank=mesh.coordinates()["pipe"])
    table = {name: whole[name] for name, _ in model.named_parameters()}
    shard_parameters(model, sharding_plan=table, mesh=mesh)
    apply_tensor_parallel(model, group=mesh.group("tensor"), vocab_size=model.config.vocab_size)
    apply_context_parallel(model, parallel=parallel, mesh=mesh)
    stage = world_over(mesh, *STAGE_AXES)
    for layer in moe_layers(model):
        number = layer.router.config.experts
        layer.batch_group = BatchRanks(
            stage, capacity_world=parallel.capacity_scope.world(mesh, experts=number)
        )
        over, slices = (
            mesh.group(axis, num_experts=number) for axis in ("expert", "expert_tensor")
        )
        if over is not None or slices is not None:
            journey, wait = parallel.dispatch, mesh.timeout_s
            layer.dispatcher = journey.build(over, expert_tensor_group=slices, timeout_s=wait)
    sharing = {
        name: GradientSync(laid.replicated_axes(_stage_axes(laid.experts)))
        for name, laid in table.items()
    }
    apply_activation_checkpointing(model, by=parallel.activation_checkpointing)
    if mesh.plan.zero:
        sharing = apply_zero(model, mesh=mesh, gradient_sync=sharing, sharding_plan=table)
    pipeline = None if stages is None else Pipeline.from_mesh(mesh, model=model, stages=stages)
    return ParallelModel(
        model, mesh=mesh, sharding_plan=whole, gradient_sync=sharing, pipeline=pipeline
    )


def apply_context_parallel(model: Transformer, *, parallel: ParallelConfig, mesh: Mesh) -> None:
    """Deal the tokens of a batch over context and tensor, and let attention cross ranks."""
    plan, place = mesh.plan, mesh.coordinates()
    lanes = plan.context * plan.tensor
    if lanes == 1:
        return
    rank = place["context"] * plan.tensor + place["tensor"]
    model.sequence_sharding = SequenceSharder(
        rank, lanes, tensor_ranks=plan.tensor, token_split=parallel.context_parallel.token_split()
    )
    group = mesh.group("context")
    for module in model.modules() if group is not None else ():
        if isinstance(module, SelfAttention | CrossAttention):
            module.backend = parallel.context_parallel.build(group, kv_heads=module.kv_heads)


def expert_counts(model: nn.Module) -> tuple[int, ...]:
    """Return the numbers of experts that the layers of a model have, for its ``Mesh``."""
    return tuple(sorted({layer.router.config.experts for layer in moe_layers(model)}))


def check_parallel(model: Transformer, *, parallel: ParallelConfig, plan: ParallelPlan) -> None:
    """Raise ConfigError with a sentence for each layer that the plan does not fit."""
    problems = list(tensor_parallel_problems(model, ranks=plan.tensor))
    problems += _context_parallel_problems(model, parallel=parallel, plan=plan)
    problems += whole_row_problems(model.config, ranks=plan.context * plan.tensor)
    for layer in moe_layers(model):
        config = layer.router.config
        plan.expert_ranks(config.experts, layer=layer.name)
        why = parallel.dispatch.problems(plan=plan, weights=layer.experts, experts=config.experts)
        if why:
            problems.append(
                f"parallel.dispatch={type(parallel.dispatch).__name__} of {layer.name}: {why}"
            )
        if plan.expert_tensor > 1:
            problems += _expert_tensor_problems(
                layer.experts, name=layer.name, cuts=plan.expert_tensor
            )
    if problems:
        raise ConfigError(problems)


def shard_parameters(model: nn.Module, *, sharding_plan: ShardingPlan, mesh: Mesh) -> None:
    """Replace every parameter by this rank's part of it."""
    done: dict[nn.Parameter, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            laid = sharding_plan.get(f"{path}.{name}" if path else name)
            if parameter not in done and laid is not None:
                held = local_spans(
                    laid, grid=mesh.grid(laid.experts), place=mesh.coordinates(laid.experts)
                )
                part = slice_local(parameter.detach(), held)
                same = part.shape == parameter.shape
                done[parameter] = parameter if same else nn.Parameter(part)
            module.register_parameter(name, done[parameter])


def _stage_axes(experts: int | None) -> tuple[str, ...]:
    return STAGE_AXES if experts is None else EXPERT_STAGE_AXES


def _context_parallel_problems(
    model: nn.Module, *, parallel: ParallelConfig, plan: ParallelPlan
) -> list[str]:
    if plan.context == 1:
        return []
    attentions = [m for m in model.modules() if isinstance(m, SelfAttention | CrossAttention)]
    heads = {module.heads // plan.tensor for module in attentions}
    why = (
        parallel.context_parallel.problems(heads=number, ranks=plan.context)
        for number in sorted(heads)
    )
    return [f"parallel.context={plan.context}: {reason}" for reason in why if reason]


def _expert_tensor_problems(bank: nn.Module, *, name: str, cuts: int) -> list[str]:
    if not isinstance(bank, GroupedExperts):
        kind = type(bank).__name__
        return [f"parallel.expert_tensor={cuts}: {kind} of {name} have no hidden width to cut"]
    if bank.bias:
        return [
            f"parallel.expert_tensor={cuts} with the biases of {name}: every slice would add them; "
            "set model.bias to false, or expert_tensor to 1"
        ]
    hidden = bank.down.shape[1]
    if hidden % cuts:
        return [f"parallel.expert_tensor={cuts} must divide the {hidden} channels of {name}"]
    return []


def whole_row_problems(config: ModelConfig, *, ranks: int) -> Iterator[str]:
    """Yield a sentence for each stack whose rules need whole rows, if so many ranks share them."""
    if ranks == 1:
        return
    for side, stack in (("encoder", config.encoder), ("decoder", config.decoder)):
        sparse = config.moe_of_stack(stack)
        if stack.moe_layers and sparse.needs_whole_rows:
            rule = type(sparse.select if isinstance(sparse, MoE) else sparse).__name__
            yield (
                f"parallel.plan: {rule} of the {side} compares the tokens of a row, but "
                f"context x tensor = {ranks} ranks share each row: set context and tensor to 1 "
                "(data, expert and pipe are free), or choose another rule"
            )
