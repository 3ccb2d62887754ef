"""Initial weights: the kind of each parameter of a module, and how all of them are drawn.

``InitConfig`` (``model/config.py``) has the table of the distributions of a whole model.
"""

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import nn

from moesaic.moe.experts import ExpertModule
from moesaic.moe.router import Router
from moesaic.nn.embedding import Embedding
from moesaic.nn.initializer import (
    ConstantWeights,
    Distribution,
    Initializer,
    NormalWeights,
    TransformedUniform,
    custom_initializers,
    draw_block,
    fan_in_std,
    parameter_key,
    router_std,
)
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


def initial_distributions(model: nn.Module, *, std_of: StdOfParameter) -> dict[str, Distribution]:
    """Return how every parameter of a whole model is drawn, by name. It may be on meta.

    Norms become 1, biases 0, the others normal with the standard deviation of ``std_of``, unless
    a module declares another distribution.
    """
    kinds, custom = parameter_kinds(model), custom_initializers(model)
    drawn: dict[str, Distribution] = {}
    for name, parameter in model.named_parameters():
        kind, initializer = kinds[name], custom.get(name, Initializer())
        if initializer.quantile is not None:
            drawn[name] = TransformedUniform(initializer.quantile)
        elif kind in ("norm", "bias"):
            drawn[name] = ConstantWeights(float(kind == "norm"))
        else:
            drawn[name] = NormalWeights(std_of(name, kind, parameter.shape, initializer))
    return drawn


def draw_whole(model: nn.Module, distributions: Mapping[str, Distribution], *, seed: int) -> None:
    """Fill the parameters of a whole model."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            draw_block(
                parameter,
                distributions[name],
                key=parameter_key(seed, name),
                offset=(0,) * parameter.dim(),
                shape=parameter.shape,
            )


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
