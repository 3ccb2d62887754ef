"""Dropout: what is dropped is a function of the token, the layer and the run's draw of its row.

So it is the same whichever rank holds the token, however the batch is cut, in a pass that is
repeated, and after resuming on another number of ranks. torch's own draws from the rank's stream.
"""

from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.context import TokenContext
from moesaic.ops.drop import dropout


class Dropout(nn.Module):
    """Sets channels to zero with probability ``rate`` in training.

    No two of a model have one ``name``.
    """

    def __init__(self, rate: float, *, name: str) -> None:
        super().__init__()
        self.rate, self.name = rate, name

    def forward(self, x: Float[Tensor, "T D"], *, context: TokenContext) -> Float[Tensor, "T D"]:
        if not self.training or not self.rate:
            return x
        return dropout(x, key=context.random_key(self.name), rate=self.rate)
