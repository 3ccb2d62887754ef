"""Arrangement: what the branches of a block read.

Letters: T tokens, D model dim.
"""

from torch import nn

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor
from moesaic.nn.norm import Norm


class BlockLayout(Choice):
    """Family: a block enters with ``entry(x)``, and each branch adds what it makes of ``reads``."""

    def input_norm(self, norm: Norm, *, dim: int) -> nn.Module:
        """Return what a block does with its input, once."""
        raise NotImplementedError

    def branch_norm(self, norm: Norm, *, dim: int) -> nn.Module:
        """Return what a branch does with what it reads."""
        raise NotImplementedError

    def branch_input(
        self, hidden: Float[Tensor, "T D"], *, block_input: Float[Tensor, "T D"]
    ) -> Float[Tensor, "T D"]:
        """Return what the next branch reads of the stream as it is now."""
        raise NotImplementedError

    def num_norms(self, branches: int) -> int:
        """Norms in a block of so many branches."""
        raise NotImplementedError


class SequentialResidual(BlockLayout):
    """Each branch reads the stream that the one before it wrote, through a norm of its own."""

    def input_norm(self, norm: Norm, *, dim: int) -> nn.Module:
        del norm, dim
        return nn.Identity()

    def branch_norm(self, norm: Norm, *, dim: int) -> nn.Module:
        return norm.build(dim)

    def branch_input(
        self, hidden: Float[Tensor, "T D"], *, block_input: Float[Tensor, "T D"]
    ) -> Float[Tensor, "T D"]:
        del block_input
        return hidden

    def num_norms(self, branches: int) -> int:
        return branches


class ParallelResidual(BlockLayout):
    """All branches read one norm of the block's input: ``x + attention(n) + feed_forward(n)``.

    Chosen by BAM (2408.08274) so that attention experts and feed-forward experts may
    run at once. Where a decoder looks at a source, that branch reads the same norm (our reading:
    the paper's models are decoders alone).
    """

    def input_norm(self, norm: Norm, *, dim: int) -> nn.Module:
        return norm.build(dim)

    def branch_norm(self, norm: Norm, *, dim: int) -> nn.Module:
        del norm, dim
        return nn.Identity()

    def branch_input(
        self, hidden: Float[Tensor, "T D"], *, block_input: Float[Tensor, "T D"]
    ) -> Float[Tensor, "T D"]:
        del hidden
        return block_input

    def num_norms(self, branches: int) -> int:
        del branches
        return 1
