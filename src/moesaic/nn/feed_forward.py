"""FeedForward: two products with an activation between, the same for every token.

Letters: T tokens, D model dim, F hidden width.
"""

from torch import nn

from moesaic.core.config import Config
from moesaic.core.shapes import Float, Tensor
from moesaic.nn.activation import Activation, SwiGLU


class FeedForwardConfig(Config):
    """Hidden width and activation, of a dense layer and of each expert unless that says its own."""

    hidden: int
    activation: Activation = SwiGLU()


class DenseFeedForward(nn.Module):
    """The layer of a ``FeedForward``."""

    def __init__(self, config: FeedForwardConfig, *, dim: int, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(dim, config.activation.width(config.hidden), bias=bias)
        self.down = nn.Linear(config.hidden, dim, bias=bias)
        self.activation = config.activation

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return self.down(self.activation(self.up(x)))
