"""Dense feed-forward: two linear maps with an activation between them; activation functions.

Letters: T tokens, D model dim, F hidden width, G width of the pre-activation.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import nn

from moesaic.core.config import Choice, Config
from moesaic.core.shapes import Float, Tensor
from moesaic.nn.fused_projections import FusedProjections, gate_and_value


class Activation(Choice):
    """Family of activations. Gated ones read twice the hidden width (gate, value).

    ``kernel_name`` is the activation's name in fused kernels; without one they are not used.
    """

    kernel_name: ClassVar[str] = ""
    gated: ClassVar[bool] = False

    def __call__(self, x: Float[Tensor, "*N G"]) -> Float[Tensor, "*N F"]:
        """Apply to the pre-activation (G = F, or 2 F if gated)."""
        raise NotImplementedError

    def width(self, hidden: int) -> int:
        """Width of the pre-activation for a hidden width."""
        return 2 * hidden if self.gated else hidden


class ReLU(Activation):
    """``max(x, 0)``, the activation of the original transformer (1706.03762)."""

    kernel_name: ClassVar[str] = "relu"

    def __call__(self, x: Float[Tensor, "*N G"]) -> Float[Tensor, "*N F"]:
        return x.relu()


class GELU(Activation):
    """Gaussian error linear unit (1606.08415), exact form."""

    kernel_name: ClassVar[str] = "gelu"

    def __call__(self, x: Float[Tensor, "*N G"]) -> Float[Tensor, "*N F"]:
        return F.gelu(x)


class TanhGELU(Activation):
    """GELU with a tanh in place of the error function (1606.08415, section 2): ``gelu_new``."""

    def __call__(self, x: Float[Tensor, "*N G"]) -> Float[Tensor, "*N F"]:
        return F.gelu(x, approximate="tanh")


class SquaredReLU(Activation):
    """``max(x, 0)^2`` (Primer, 2109.08668)."""

    kernel_name: ClassVar[str] = "relu2"

    def __call__(self, x: Float[Tensor, "*N G"]) -> Float[Tensor, "*N F"]:
        return x.relu().square()


class SwiGLU(Activation):
    """``silu(gate) * value`` (2002.05202)."""

    kernel_name: ClassVar[str] = "swiglu"
    gated: ClassVar[bool] = True

    def __call__(self, x: Float[Tensor, "*N G"]) -> Float[Tensor, "*N F"]:
        gate, value = x.chunk(2, -1)
        return F.silu(gate) * value


class ClampedSwiGLU(Activation):
    """``gate sigmoid(alpha gate) (value + 1)`` of limited inputs (GPT-OSS, 2508.10925).

    The gate is at most ``limit``, the value between ``-limit`` and ``limit``.
    """

    alpha: float = Field(default=1.702, gt=0)
    limit: float = Field(default=7.0, gt=0)
    gated: ClassVar[bool] = True

    def __call__(self, x: Float[Tensor, "*N G"]) -> Float[Tensor, "*N F"]:
        gate, value = x.chunk(2, -1)
        gate, value = gate.clamp(max=self.limit), value.clamp(-self.limit, self.limit)
        return gate * (self.alpha * gate).sigmoid() * (value + 1)


class GEGLU(Activation):
    """``gelu(gate) * value`` (2002.05202), of the exact GELU or of ``TanhGELU`` (T5 1.1)."""

    gated: ClassVar[bool] = True
    form: Literal["exact", "tanh"] = "exact"

    def __call__(self, x: Float[Tensor, "*N G"]) -> Float[Tensor, "*N F"]:
        gate, value = x.chunk(2, -1)
        return F.gelu(gate, approximate="none" if self.form == "exact" else "tanh") * value


class ReGLU(Activation):
    """``max(gate, 0) * value`` (2002.05202)."""

    gated: ClassVar[bool] = True

    def __call__(self, x: Float[Tensor, "*N G"]) -> Float[Tensor, "*N F"]:
        gate, value = x.chunk(2, -1)
        return gate.relu() * value


class FeedForwardConfig(Config):
    """Hidden width and activation of a dense layer, and of each expert unless it has its own."""

    hidden: int = Field(ge=1)
    activation: Activation = SwiGLU()


class DenseFeedForward(FusedProjections):
    """The layer of a ``FeedForwardConfig``."""

    def __init__(self, config: FeedForwardConfig, *, dim: int, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(dim, config.activation.width(config.hidden), bias=bias)
        self.down = nn.Linear(config.hidden, dim, bias=bias)
        self.activation = config.activation

    def fused_outputs(self) -> Mapping[str, tuple[int, ...]]:
        width, hidden = self.up.out_features, self.down.in_features
        return {"up.weight": gate_and_value(width, hidden=hidden)}

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return self.down(self.activation(self.up(x)))
