"""Weights: a model's parameters and buffers as named tensors, out and in."""

from collections.abc import Mapping

import torch
from torch import nn

from moesaic.core.errors import CheckpointError
from moesaic.core.shapes import Tensor


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
