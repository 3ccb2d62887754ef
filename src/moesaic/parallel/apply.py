"""Apply: lay a model over the ranks of a mesh. The one place that knows the order.

Cut what axes cut, give layers the parts that know other ranks, say what is recomputed, and last
let ZeRO share out what is left.
"""

from torch import nn

from moesaic.core.errors import ConfigError
from moesaic.dist.mesh import STAGE_AXES, Mesh
from moesaic.dist.plan import ParallelPlan
from moesaic.dist.world import World
from moesaic.model.transformer import Transformer
from moesaic.moe.experts import GroupedExperts
from moesaic.moe.layer import moe_layers
from moesaic.nn.attention import CrossAttention, SelfAttention
from moesaic.parallel import whole_rows
from moesaic.parallel.config import Parallel
from moesaic.parallel.deal import Deal
from moesaic.parallel.layout import Layout, layout
from moesaic.parallel.pipeline import Pipeline
from moesaic.parallel.ranks import BatchRanks, world_of
from moesaic.parallel.recompute import recompute
from moesaic.parallel.sharing import Sharing
from moesaic.parallel.slices import spans, take
from moesaic.parallel.spread import Spread
from moesaic.parallel.tensor import narrow, refuses
from moesaic.parallel.zero import share_out

EXPERT_COPIES = ("expert_data", "expert", "expert_tensor")


def lay(
    model: Transformer, *, parallel: Parallel, world: World, timeout_s: float = 120.0
) -> Spread:
    """Lay a whole model, alike on every rank, over the ranks of ``world``. Collective.

    The model itself becomes this rank's part. Raises ConfigError where the plan fits neither the
    number of ranks nor the model.
    """
    mesh = Mesh(
        parallel.plan.resolve(world.size),
        rank=world.rank,
        device=world.device,
        expert_counts=experts_of(model),
        timeout_s=timeout_s,
    )
    return apply(model, parallel=parallel, mesh=mesh)


def apply(model: Transformer, *, parallel: Parallel, mesh: Mesh) -> Spread:
    """Lay a whole model over the ranks of a mesh that is there (see ``lay``). Collective."""
    check(model, parallel=parallel, plan=mesh.plan)
    stages = parallel.staged(model.config) if mesh.plan.pipe > 1 else None
    whole = layout(model)
    if stages is not None:
        stages.keep_only(model, rank=mesh.coordinates()["pipe"])
    table = {name: whole[name] for name, _ in model.named_parameters()}
    cut(model, table=table, mesh=mesh)
    narrow(model, group=mesh.group("tensor"), vocab_size=model.config.vocab_size)
    deal(model, parallel=parallel, mesh=mesh)
    stage = world_of(mesh, *STAGE_AXES)
    for layer in moe_layers(model):
        number = layer.router.config.experts
        layer.batch_group = BatchRanks(stage, room=parallel.room.world(mesh, experts=number))
        over, slices = (mesh.group(axis, num_experts=number) for axis in ("expert", "expert_tensor"))
        if over is not None or slices is not None:
            journey, wait = parallel.journey, mesh.timeout_s
            layer.dispatcher = journey.build(over, slices=slices, timeout_s=wait)
    sharing = {name: Sharing(laid.held(_axes(laid.experts))) for name, laid in table.items()}
    recompute(model, by=parallel.recompute)
    if mesh.plan.zero:
        sharing = share_out(model, mesh=mesh, sharing=sharing, table=table)
    pipeline = None if stages is None else Pipeline.on(mesh, model=model, stages=stages)
    return Spread(model, mesh=mesh, layout=whole, sharing=sharing, pipeline=pipeline)


def deal(model: Transformer, *, parallel: Parallel, mesh: Mesh) -> None:
    """Deal the tokens of a batch over context and tensor, and let attention cross ranks."""
    plan, place = mesh.plan, mesh.coordinates()
    lanes = plan.context * plan.tensor
    if lanes == 1:
        return
    rank = place["context"] * plan.tensor + place["tensor"]
    model.sequence_sharding = Deal(rank, lanes, lanes=plan.tensor, cut=parallel.reach.cut())
    group = mesh.group("context")
    for module in model.modules() if group is not None else ():
        if isinstance(module, SelfAttention | CrossAttention):
            module.backend = parallel.reach.build(group, groups=module.kv_heads)


def experts_of(model: nn.Module) -> tuple[int, ...]:
    """Return the numbers of experts that the layers of a model have, for its ``Mesh``."""
    return tuple(sorted({layer.router.config.experts for layer in moe_layers(model)}))


def check(model: Transformer, *, parallel: Parallel, plan: ParallelPlan) -> None:
    """Raise ConfigError with a sentence for each layer that the plan does not fit."""
    problems = list(refuses(model, lanes=plan.tensor))
    problems += _cannot_reach(model, parallel=parallel, plan=plan)
    problems += whole_rows.refuses(model.config, ranks=plan.context * plan.tensor)
    for layer in moe_layers(model):
        config = layer.router.config
        plan.expert_ranks(config.experts, layer=layer.name)
        why = parallel.journey.problems(plan=plan, bank=layer.experts, experts=config.experts)
        if why:
            problems.append(
                f"parallel.journey={type(parallel.journey).__name__} of {layer.name}: {why}"
            )
        if plan.expert_tensor > 1:
            problems += _cannot_slice(layer.experts, name=layer.name, cuts=plan.expert_tensor)
    if problems:
        raise ConfigError(problems)


def cut(model: nn.Module, *, table: Layout, mesh: Mesh) -> None:
    """Replace every parameter by this rank's part of it."""
    done: dict[nn.Parameter, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            laid = table.get(f"{path}.{name}" if path else name)
            if parameter not in done and laid is not None:
                held = spans(laid, grid=mesh.grid(laid.experts), place=mesh.coordinates(laid.experts))
                part = take(parameter.detach(), held)
                same = part.shape == parameter.shape
                done[parameter] = parameter if same else nn.Parameter(part)
            module.register_parameter(name, done[parameter])


def _axes(experts: int | None) -> tuple[str, ...]:
    return STAGE_AXES if experts is None else EXPERT_COPIES


def _cannot_reach(model: nn.Module, *, parallel: Parallel, plan: ParallelPlan) -> list[str]:
    if plan.context == 1:
        return []
    attentions = [m for m in model.modules() if isinstance(m, SelfAttention | CrossAttention)]
    heads = {module.heads // plan.tensor for module in attentions}
    why = (parallel.reach.problems(heads=number, ranks=plan.context) for number in sorted(heads))
    return [f"parallel.context={plan.context}: {reason}" for reason in why if reason]


def _cannot_slice(bank: nn.Module, *, name: str, cuts: int) -> list[str]:
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
