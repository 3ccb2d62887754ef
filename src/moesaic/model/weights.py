"""Weights: a model's parameters and buffers as named tensors, out and in.

Init: what kind each parameter is, and the distribution it starts from (table: ``InitConfig``).
"""

from collections.abc import Mapping
from typing import Literal, cast

import torch
from torch import nn

from moesaic.core.errors import CheckpointError
from moesaic.core.shapes import Tensor
from moesaic.model.config import InitConfig, ModelConfig
from moesaic.moe.experts import ExpertModule
from moesaic.moe.router import Router
from moesaic.nn.embedding import Embedding
from moesaic.nn.initializer import Initializer, custom_initializers

ParameterKind = Literal["embedding", "norm", "bias", "matrix", "expert", "router"]


def parameter_kinds(model: nn.Module) -> dict[str, ParameterKind]:
    """The kind of every parameter, by name, in the order of ``named_parameters``."""
    owners = {
        f"{path}.{name}" if path else name: (module, name)
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }
    routers = tuple(f"{path}." for path, m in model.named_modules() if isinstance(m, Router))
    routers += ("encoder_routing.", "decoder_routing.")  # what routers of a stack share
    said = {name: start.kind for name, start in custom_initializers(model).items() if start.kind}
    return {
        name: cast("ParameterKind", said[name])
        if name in said
        else _kind_of(*owners[name], routes=name.startswith(routers))
        for name, _ in model.named_parameters()
    }


def _kind_of(module: nn.Module, name: str, *, routes: bool) -> ParameterKind:
    if name.endswith("bias"):
        return "bias"
    if routes:
        return "router"
    if isinstance(module, Embedding | nn.Embedding):
        return "embedding"
    if isinstance(module, ExpertModule):
        return "expert"
    return "matrix" if isinstance(module, nn.Linear) else "norm"


@torch.no_grad()
def initialize_weights(model: nn.Module, config: ModelConfig) -> None:
    """Draw every parameter from torch's global generator, in the order of the kinds."""
    kinds, said = parameter_kinds(model), custom_initializers(model)
    for name, parameter in model.named_parameters():
        kind = kinds[name]
        if kind == "norm":
            parameter.fill_(1.0)
        elif kind == "bias":
            parameter.zero_()
        else:
            own = said.get(name, Initializer())
            std = init_std(name, kind=kind, shape=parameter.shape, initializer=own, config=config)
            parameter.normal_(std=std)


def init_std(
    name: str,
    *,
    kind: ParameterKind,
    shape: torch.Size,
    initializer: Initializer,
    config: ModelConfig,
) -> float:
    """Standard deviation that a weight starts with."""
    init: InitConfig = config.init
    if initializer.std is not None:
        return initializer.std
    if kind == "embedding":
        return init.embedding_std or config.dim**-0.5
    if kind == "router":
        return init.router_std or (0.1 / shape[-1]) ** 0.5
    # Linear is [out, in], a bank [E, in, out]
    fan_in = initializer.fan_in or (shape[-1] if kind == "matrix" else shape[-2])
    std = init.std or fan_in**-0.5
    back = name.rsplit(".", 2)[-2:]
    returns = "down" in back or "out" in back
    return (
        std * num_residual_branches(name, config) ** -0.5
        if returns and init.scale_by_depth
        else std
    )


def num_residual_branches(name: str, config: ModelConfig) -> int:
    """Residual branches of the stack that a parameter is in."""
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
    """Put exported weights back in place, all or none.

    Raises CheckpointError naming every tensor that is missing, unknown or of another shape.
    """
    own = export_weights(model)
    problems = [f"{name} is missing" for name in own if name not in tensors]
    problems += [f"{name} is not in this model" for name in tensors if name not in own]
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if problems:
        more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
        raise CheckpointError(f"the weights do not fit: {'; '.join(problems[:4])}{more}")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
