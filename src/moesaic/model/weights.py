"""Model weights: initial values, export and restore by name.

``InitConfig`` (``model/config.py``) has the table of initial distributions.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from moesaic.core.errors import CheckpointError
from moesaic.core.shapes import Tensor
from moesaic.model.config import ModelConfig
from moesaic.moe.initial_weights import default_std, initial_distributions
from moesaic.nn.initializer import Distribution, Initializer
from moesaic.optim.optimizer import ParameterKind


def weight_distributions(model: nn.Module, config: ModelConfig) -> dict[str, Distribution]:
    """Return how every parameter of a whole model is drawn, by name."""

    def std_of(
        name: str, kind: ParameterKind, shape: torch.Size, initializer: Initializer
    ) -> float:
        return init_std(name, kind=kind, shape=shape, initializer=initializer, config=config)

    return initial_distributions(model, std_of=std_of)


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
    std = default_std(kind, shape=shape, initializer=initializer)
    if initializer.std is not None:
        return std
    given = {"embedding": init.embedding_std, "router": init.router_std}
    if kind in given:
        return given[kind] or std
    std = init.std or std
    ends_branch = {"down", "out"} & set(name.rsplit(".", 2)[-2:])
    scaled = ends_branch and init.scale_by_depth
    return std * num_residual_branches(name, config) ** -0.5 if scaled else std


def num_residual_branches(name: str, config: ModelConfig) -> int:
    """Return the number of residual branches in the stack that a parameter belongs to."""
    side = "encoder" if name.startswith("encoder") else "decoder"
    stack = config.stack_of(side)
    cross = side == "decoder" and bool(config.encoder.layers)
    blocks = map(stack.block_pattern, range(stack.layers))
    return sum(len(block.branches) + cross + block.feed_forward for block in blocks)


def export_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and saved buffer by name, tied ones once. Not copied."""
    names = set(model.state_dict())
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in tensors if name in names}


def require_fitting_weights(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise CheckpointError naming every tensor that is missing, unknown or of another shape.

    ``model`` may be on the meta device: weights are compared before anything is allocated.
    """
    _require_same_shapes(export_weights(model), shapes)


def _require_same_shapes(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = fitting_problems(expected, shapes)
    problems += [f"{name} is not in this model" for name in shapes if name not in expected]
    raise_if_unfit(problems)


def fitting_problems(
    expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]
) -> list[str]:
    """Return a sentence for every tensor that is missing or of another shape than expected."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    return problems + [
        f"{name} has shape {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]


def raise_if_unfit(problems: Sequence[str]) -> None:
    """Raise CheckpointError with the first problems, if there are any."""
    if problems:
        more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
        raise CheckpointError(f"the weights do not fit: {'; '.join(problems[:4])}{more}")


def restore_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy exported weights into a model, all or none. Raises as ``restore_tensors``."""
    restore_tensors(export_weights(model), tensors)


@torch.no_grad()
def restore_tensors(into: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into those of the same names, all or none.

    Raises CheckpointError naming every tensor that is missing, unknown or of another shape.
    """
    _require_same_shapes(into, {name: tensor.shape for name, tensor in tensors.items()})
    for name, tensor in into.items():
        tensor.copy_(tensors[name])


def describe_nonfinite(model: nn.Module) -> str:
    """Return which weights are NaN or infinite (``"NaN in a.weight (1 of 16 values)"``), or ""."""
    found = []
    for name, tensor in export_weights(model).items():
        if not tensor.is_floating_point():
            continue
        wrong = tensor.numel() - int(tensor.isfinite().sum())
        if wrong:
            what = "NaN" if bool(tensor.isnan().any()) else "infinity"
            found.append(f"{what} in {name} ({wrong} of {tensor.numel()} values)")
    more = f" and {len(found) - 3} more tensors" if len(found) > 3 else ""
    return "; ".join(found[:3]) + more
