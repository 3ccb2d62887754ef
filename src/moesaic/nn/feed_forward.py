"""FeedForwardConfig: two products with an activation between, the same for every token.

Letters: T tokens, D model dim, F hidden width.

Activation: what happens between the two products of a feed-forward.

A gated activation reads twice the hidden width (gate, value) and writes it once.

Letters: F hidden width.
"""

from typing import ClassVar

import torch.nn.functional as F
from torch import nn

from moesaic.core.config import Choice, Config
from moesaic.core.shapes import Float, Tensor


class Activation(Choice):
    """Family of activations. ``gated`` ones halve the last dimension.

    ``kept`` is how many hidden widths autograd keeps for backward in a dense layer, the input of
    the second product included (for forecasts). ``kernel`` is the name that fused kernels know it
    by; empty, as in a member of your own, means that the composed path is taken.
    """

    kernel_name: ClassVar[str] = ""
    gated: ClassVar[bool] = False
    saved_activations: ClassVar[int] = 2

    def __call__(self, x: Float[Tensor, "*N G"]) -> Float[Tensor, "*N F"]:
        """Apply to the pre-activation (G = F, or 2F if gated)."""
        raise NotImplementedError

    def width(self, hidden: int) -> int:
        """Width of the pre-activation for a hidden width."""
        return 2 * hidden if self.gated else hidden


class ReLU(Activation):
    """``max(x, 0)``, the activation of the original transformer (1706.03762)."""

    kernel_name: ClassVar[str] = "relu"
    saved_activations: ClassVar[int] = 1

    def __call__(self, x: Float[Tensor, "*N G"]) -> Float[Tensor, "*N F"]:
        return x.relu()


class GELU(Activation):
    """Gaussian error linear unit (1606.08415), exact form."""

    kernel_name: ClassVar[str] = "gelu"

    def __call__(self, x: Float[Tensor, "*N G"]) -> Float[Tensor, "*N F"]:
        return F.gelu(x)


class SquaredReLU(Activation):
    """``max(x, 0)^2`` (Primer, 2109.08668)."""

    kernel_name: ClassVar[str] = "relu2"

    def __call__(self, x: Float[Tensor, "*N G"]) -> Float[Tensor, "*N F"]:
        return x.relu().square()


class SwiGLU(Activation):
    """``silu(gate) * value`` (2002.05202)."""

    kernel_name: ClassVar[str] = "swiglu"
    gated: ClassVar[bool] = True
    saved_activations: ClassVar[int] = 4

    def __call__(self, x: Float[Tensor, "*N G"]) -> Float[Tensor, "*N F"]:
        gate, value = x.chunk(2, -1)
        return F.silu(gate) * value


class FeedForwardConfig(Config):
    """Hidden width and activation, of a dense layer and of each expert unless that says its own."""

    hidden: int
    activation: Activation = SwiGLU()


class DenseFeedForward(nn.Module):
    """The layer of a ``FeedForwardConfig``."""

    def __init__(self, config: FeedForwardConfig, *, dim: int, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(dim, config.activation.width(config.hidden), bias=bias)
        self.down = nn.Linear(config.hidden, dim, bias=bias)
        self.activation = config.activation

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return self.down(self.activation(self.up(x)))
