"""Model weights: the kind of each parameter, initial values, export and restore by name.

``InitConfig`` (``model/config.py``) has the table of initial distributions.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

from moesaic.core.errors import CheckpointError
from moesaic.core.shapes import Tensor
from moesaic.model.config import ModelConfig
from moesaic.moe.experts import ExpertModule
from moesaic.moe.router import Router
from moesaic.nn.embedding import Embedding
from moesaic.nn.initializer import (
    Initializer,
    custom_initializers,
    fan_in_std,
    router_std,
)
from moesaic.optim.optimizer import ParameterKind


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


@torch.no_grad()
def initialize_weights(model: nn.Module, config: ModelConfig) -> None:
    """Draw every parameter from torch's global generator, in the order of ``named_parameters``."""
    kinds, custom = parameter_kinds(model), custom_initializers(model)
    for name, parameter in model.named_parameters():
        kind = kinds[name]
        if kind == "norm":
            parameter.fill_(1.0)
        elif kind == "bias":
            parameter.zero_()
        else:
            initializer = custom.get(name, Initializer())
            std = init_std(
                name, kind=kind, shape=parameter.shape, initializer=initializer, config=config
            )
            parameter.normal_(std=std)


def init_std(
    name: str,
    *,
    kind: ParameterKind,
    shape: torch.Size,
    initializer: Initializer,
    config: ModelConfig,
) -> float:
    """Return the standard deviation that a weight is drawn with."""
    init = config.init
    if initializer.std is not None:
        return initializer.std
    if kind == "embedding":
        return init.embedding_std or fan_in_std(config.dim)
    if kind == "router":
        return init.router_std or router_std(shape[-1])
    # nn.Linear's weight is [out, in], that of experts [E, in, out]
    fan_in = initializer.fan_in or (shape[-1] if kind == "matrix" else shape[-2])
    std = init.std or fan_in_std(fan_in)
    ends_branch = {"down", "out"} & set(name.rsplit(".", 2)[-2:])
    scaled = ends_branch and init.scale_by_depth
    return std * num_residual_branches(name, config) ** -0.5 if scaled else std


def num_residual_branches(name: str, config: ModelConfig) -> int:
    """Return the number of residual branches in the stack that a parameter belongs to."""
    if name.startswith("encoder"):
        return 2 * config.encoder.layers
    return (3 if config.encoder.layers else 2) * config.decoder.layers


def export_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and saved buffer by name, tied ones once. Not copied."""
    names = set(model.state_dict())
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in tensors if name in names}


@torch.no_grad()
def restore_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy exported weights into a model, all or none.

    Raises CheckpointError naming every tensor that is missing, unknown or of another shape.
    """
    expected = export_weights(model)
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is not in this model" for name in tensors if name not in expected]
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if problems:
        more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
        raise CheckpointError(f"the weights do not fit: {'; '.join(problems[:4])}{more}")
    for name, tensor in expected.items():
        tensor.copy_(tensors[name])
