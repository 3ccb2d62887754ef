"""Norms: rescale each token's vector to unit size, with a learned gain per channel.

Letters: T tokens, D model dim.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import nn

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor
from moesaic.nn.parameter_spec import ParameterSpec
from moesaic.ops.rms_norm import rms_norm


class Norm(Choice):
    """Family of norms."""

    def build(self, dim: int) -> nn.Module:
        """Return the module for vectors of ``dim`` channels."""
        raise NotImplementedError

    def parameter_specs(self, dim: int, /) -> Sequence[ParameterSpec]:
        """Return the parameters of the module."""
        return (ParameterSpec("norm", (dim,)),)


class RMSNorm(Norm):
    """Root mean square norm (1910.07467): ``x / rms(x) * gain``."""

    eps: float = Field(default=1e-6, gt=0)

    def build(self, dim: int) -> nn.Module:
        return RMSNormModule(self, dim=dim)


class LayerNorm(Norm):
    """Layer norm (1607.06450). On a CPU its fused kernel makes it the fastest of the family."""

    eps: float = Field(default=1e-5, gt=0)
    bias: bool = False

    def parameter_specs(self, dim: int, /) -> Sequence[ParameterSpec]:
        bias = (ParameterSpec("bias", (dim,)),) if self.bias else ()
        return (ParameterSpec("norm", (dim,)), *bias)

    def build(self, dim: int) -> nn.Module:
        return nn.LayerNorm(dim, eps=self.eps, bias=self.bias)


class RMSNormModule(nn.Module):
    """The module of ``RMSNorm``."""

    def __init__(self, config: RMSNorm, *, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = config.eps

    def forward(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T D"]:
        return rms_norm(x, weight=self.weight, eps=self.eps)
