"""Block layouts: whether the branches of a transformer block run in sequence or in parallel.

Letters: T tokens, D model dim.
"""

from typing import ClassVar

from pydantic import Field
from torch import nn

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor
from moesaic.nn.norm import Norm


class BlockLayout(Choice):
    """Family of block layouts. ``shares_norm``: all branches read one norm of the block's input.

    What a branch adds to the residual stream is multiplied by ``residual_multiplier`` (Granite).
    """

    residual_multiplier: float = Field(default=1.0, gt=0)
    shares_norm: ClassVar[bool] = False

    def input_norm(self, norm: Norm, *, dim: int) -> nn.Module:
        """Return the module that a block applies to its input, once."""
        return norm.build(dim) if self.shares_norm else nn.Identity()

    def branch_norm(self, norm: Norm, *, dim: int) -> nn.Module:
        """Return the module that a branch applies to its input."""
        return nn.Identity() if self.shares_norm else norm.build(dim)

    def branch_input(
        self, x: Float[Tensor, "T D"], *, normed_input: Float[Tensor, "T D"]
    ) -> Float[Tensor, "T D"]:
        """Return the input of a branch: ``x``, the residual stream, or the block's normed input."""
        return normed_input if self.shares_norm else x

    def num_norms(self, branches: int) -> int:
        """Norms in a block of so many branches."""
        return 1 if self.shares_norm else branches


class SequentialResidual(BlockLayout):
    """Each branch reads the residual stream after the branch before it, through its own norm."""


class ParallelResidual(BlockLayout):
    """All branches read one norm of the block's input: ``x + attention(n) + feed_forward(n)``.

    Chosen by BAM (2408.08274) so that attention experts and feed-forward experts can run
    concurrently. A decoder's cross-attention reads the same norm (our reading: the paper's models
    are decoder-only).
    """

    shares_norm: ClassVar[bool] = True
