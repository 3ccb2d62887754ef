"""Adapters: what is trained beside a frozen linear map, its child module ``adapter``.

The parameters of what ``module.weight`` belongs to keep their names; those of the adapter are named
after the matrix that they change: ``module.adapter.weight_a``.

Letters: T tokens, M inputs, N outputs, r rank.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.nn.initializer import CustomInitializers, Initializer, fan_in_std, normal_parameter

ADAPTER = "adapter"


def adapter_name(parameter: str, part: str) -> str:
    """Return the name of a part of the adapter of a matrix: ``a.weight`` -> ``a.adapter.weight_b``.

    ``parameter`` may be the name in a module or in the whole model.
    """
    module, dot, name = parameter.rpartition(".")
    return f"{module}{dot}{ADAPTER}.{name}_{part}"


def is_of_adapter(parameter: str) -> bool:
    """Whether a parameter of a model belongs to an adapter, by its name."""
    return f".{ADAPTER}." in parameter


class LinearAdapter(CustomInitializers):
    """Base of the adapters of an ``nn.Linear``."""

    def forward(self, x: Float[Tensor, "*T M"]) -> Float[Tensor, "*T N"]:
        """Return what is added to the output of the frozen map."""
        raise NotImplementedError


def add_adapter(linear: nn.Linear, adapter: LinearAdapter) -> None:
    """Add an adapter to a linear map: its output is added in a forward hook."""
    linear.add_module(ADAPTER, adapter)
    linear.register_forward_hook(_add_output)


def adapter_of(linear: nn.Linear) -> LinearAdapter | None:
    """Return the adapter of a linear map, None if it has none."""
    found = linear._modules.get(ADAPTER)
    return found if isinstance(found, LinearAdapter) else None


def _add_output(linear: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    adapter = adapter_of(linear)
    assert adapter is not None
    return output + adapter(inputs[0])


class LowRankLinear(LinearAdapter):
    """LoRA (2106.09685, equation 3): adds ``scale * x A^T B^T`` to ``x W^T``.

    ``weight_a`` is A [r, M], ``weight_b`` is B [N, r], zeros at the start.
    """

    def __init__(self, linear: nn.Linear, *, rank: int, scale: float) -> None:
        super().__init__()
        with torch.device(linear.weight.device):
            std = fan_in_std(linear.in_features)
            self.weight_a = normal_parameter(rank, linear.in_features, std=std)
            self.weight_b = normal_parameter(linear.out_features, rank, std=0.0)
        self.scale = scale

    def initializers(self) -> Mapping[str, Initializer]:
        return {
            "weight_a": Initializer("matrix", std=fan_in_std(self.weight_a.shape[1])),
            "weight_b": Initializer("matrix", std=0.0),
        }

    def forward(self, x: Float[Tensor, "*T M"]) -> Float[Tensor, "*T N"]:
        return self.scale * F.linear(F.linear(x, self.weight_a), self.weight_b)
