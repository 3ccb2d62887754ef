"""Initial weights: the kind of each parameter of a module, and how all of them are drawn.

``InitConfig`` (``model/config.py``) has the table of the distributions of a whole model.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from moesaic.moe.experts import ExpertModule
from moesaic.moe.router import Router
from moesaic.nn.embedding import Embedding
from moesaic.nn.initializer import Initializer, custom_initializers, fan_in_std, router_std
from moesaic.optim.optimizer import ParameterKind

# name, kind, shape and initializer of a parameter -> standard deviation
StdOfParameter = Callable[[str, ParameterKind, torch.Size, Initializer], float]


def parameter_kinds(model: nn.Module) -> dict[str, ParameterKind]:
    """Return the kind of every parameter, by name, in the order of ``named_parameters``."""
    owners = {
        f"{path}.{name}" if path else name: module
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }
    routers = tuple(f"{path}." for path, m in model.named_modules() if isinstance(m, Router))
    routers += ("encoder_routing.", "decoder_routing.")  # shared by the routers of a stack
    custom = {name: own.kind for name, own in custom_initializers(model).items() if own.kind}
    return {
        name: cast("ParameterKind", custom[name])
        if name in custom
        else _kind_of(owners[name], name, is_router=name.startswith(routers))
        for name, _ in model.named_parameters()
    }


@torch.no_grad()
def draw_parameters(model: nn.Module, *, std_of: StdOfParameter) -> None:
    """Draw every parameter from torch's global generator, in the order of ``named_parameters``.

    Norms become 1, biases 0, the others normal with the standard deviation of ``std_of``, unless
    a module draws a parameter in its own way.
    """
    kinds, custom = parameter_kinds(model), custom_initializers(model)
    for name, parameter in model.named_parameters():
        kind, initializer = kinds[name], custom.get(name, Initializer())
        if initializer.draw is not None:
            initializer.draw(parameter)
        elif kind == "norm":
            parameter.fill_(1.0)
        elif kind == "bias":
            parameter.zero_()
        else:
            parameter.normal_(std=std_of(name, kind, parameter.shape, initializer))


def default_std(kind: ParameterKind, *, shape: torch.Size, initializer: Initializer) -> float:
    """Return the standard deviation of a weight where no config sets one."""
    if initializer.std is not None:
        return initializer.std
    if kind == "embedding":
        return fan_in_std(shape[-1])
    if kind == "router":
        return router_std(shape[-1])
    # nn.Linear's weight is [out, in], that of experts [E, in, out]
    return fan_in_std(initializer.fan_in or (shape[-1] if kind == "matrix" else shape[-2]))


def _kind_of(module: nn.Module, name: str, *, is_router: bool) -> ParameterKind:
    if name.endswith("bias"):
        return "bias"
    if is_router:
        return "router"
    if isinstance(module, Embedding | nn.Embedding):
        return "embedding"
    if isinstance(module, ExpertModule):
        return "expert"
    return "matrix" if isinstance(module, nn.Linear) else "norm"
