"""Apply: lay a model over the ranks of a mesh. The one place that knows the order.

Cut what axes cut, give layers the parts that know other ranks, say what is recomputed, and last
let ZeRO share out what is left.
"""

from torch import nn

from moesaic.core.errors import ConfigError
from moesaic.dist.mesh import STAGE, Mesh
from moesaic.dist.plan import ParallelPlan
from moesaic.model.transformer import Transformer
from moesaic.moe.dispatch_far import AllToAllDispatcher
from moesaic.moe.experts import Experts
from moesaic.moe.layer import layers
from moesaic.parallel.deal import Deal
from moesaic.parallel.layout import Layout, layout
from moesaic.parallel.slices import spans, take
from moesaic.parallel.spread import Sharing, Spread
from moesaic.parallel.tensor import narrow, refuses
from moesaic.parallel.zero import share_out

EXPERT_COPIES = ("expert_data", "expert", "expert_tensor")


def apply(model: Transformer, *, mesh: Mesh) -> Spread:
    """Lay a whole model, alike on every rank, over the ranks of ``mesh``. Collective.

    The model itself becomes this rank's part. Raises ConfigError where it cannot be cut so.
    """
    check(model, plan=mesh.plan)
    table = layout(model)
    cut(model, table=table, mesh=mesh)
    narrow(model, group=mesh.group("tensor"))
    place = mesh.place()
    rank = place["context"] * mesh.plan.tensor + place["tensor"]
    lanes = mesh.plan.context * mesh.plan.tensor
    if lanes > 1:
        model.deal = Deal(rank, lanes, lanes=mesh.plan.tensor)
    for layer in layers(model):
        number = layer.router.config.experts
        over = mesh.group("expert", experts=number)
        layer.dispatcher = AllToAllDispatcher(
            over, slices=mesh.group("expert_tensor", experts=number)
        )
    sharing = {name: Sharing(laid.held(_axes(laid.experts))) for name, laid in table.items()}
    if mesh.plan.zero:
        sharing = share_out(model, mesh=mesh, sharing=sharing, table=table)
    return Spread(model, mesh=mesh, layout=table, sharing=sharing)


def experts_of(model: nn.Module) -> tuple[int, ...]:
    """Return the numbers of experts that the layers of a model have, for its ``Mesh``."""
    return tuple(sorted({layer.router.config.experts for layer in layers(model)}))


def check(model: Transformer, *, plan: ParallelPlan) -> None:
    """Raise ConfigError with a sentence for each layer that the plan does not fit."""
    problems = [
        f"parallel.tensor={plan.tensor} must divide them, but {why}"
        for why in refuses(model, lanes=plan.tensor)
    ]
    for layer in layers(model):
        config = layer.router.config
        plan.spread(config.experts, layer=layer.name)
        if plan.expert_tensor > 1:
            problems += _cannot_slice(layer.experts, name=layer.name, cuts=plan.expert_tensor)
    if problems:
        raise ConfigError(problems)


def cut(model: nn.Module, *, table: Layout, mesh: Mesh) -> None:
    """Replace every parameter by this rank's part of it."""
    done: dict[nn.Parameter, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            laid = table.get(f"{path}.{name}" if path else name)
            if parameter not in done and laid is not None:
                held = spans(laid, grid=mesh.grid(laid.experts), place=mesh.place(laid.experts))
                part = take(parameter.detach(), held)
                same = part.shape == parameter.shape
                done[parameter] = parameter if same else nn.Parameter(part)
            module.register_parameter(name, done[parameter])


def _axes(experts: int | None) -> tuple[str, ...]:
    return STAGE if experts is None else EXPERT_COPIES


def _cannot_slice(bank: nn.Module, *, name: str, cuts: int) -> list[str]:
    if not isinstance(bank, Experts):
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
