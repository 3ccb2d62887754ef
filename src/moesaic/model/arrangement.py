"""Arrangement: what the branches of a block read.

Letters: T tokens, D model dim.
"""

from torch import nn

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor
from moesaic.nn.norm import Norm


class Arrangement(Choice):
    """Family: a block enters with ``entry(x)``, and each branch adds what it makes of ``reads``."""

    def entry(self, norm: Norm, *, dim: int) -> nn.Module:
        """Return what a block does with its input, once."""
        raise NotImplementedError

    def branch_norm(self, norm: Norm, *, dim: int) -> nn.Module:
        """Return what a branch does with what it reads."""
        raise NotImplementedError

    def reads(
        self, now: Float[Tensor, "T D"], *, entered: Float[Tensor, "T D"]
    ) -> Float[Tensor, "T D"]:
        """Return what the next branch reads of the stream as it is now."""
        raise NotImplementedError

    def norms(self, branches: int) -> int:
        """Norms in a block of so many branches."""
        raise NotImplementedError


class Serial(Arrangement):
    """Each branch reads the stream that the one before it wrote, through a norm of its own."""

    def entry(self, norm: Norm, *, dim: int) -> nn.Module:
        del norm, dim
        return nn.Identity()

    def branch_norm(self, norm: Norm, *, dim: int) -> nn.Module:
        return norm.build(dim)

    def reads(
        self, now: Float[Tensor, "T D"], *, entered: Float[Tensor, "T D"]
    ) -> Float[Tensor, "T D"]:
        del entered
        return now

    def norms(self, branches: int) -> int:
        return branches


class Parallel(Arrangement):
    """All branches read one norm of the block's input: ``x + attention(n) + feed_forward(n)``.

    Chosen by BAM (2408.08274) so that attention experts and feed-forward experts may
    run at once. Where a decoder looks at a source, that branch reads the same norm (our reading:
    the paper's models are decoders alone).
    """

    def entry(self, norm: Norm, *, dim: int) -> nn.Module:
        return norm.build(dim)

    def branch_norm(self, norm: Norm, *, dim: int) -> nn.Module:
        del norm, dim
        return nn.Identity()

    def reads(
        self, now: Float[Tensor, "T D"], *, entered: Float[Tensor, "T D"]
    ) -> Float[Tensor, "T D"]:
        del now
        return entered

    def norms(self, branches: int) -> int:
        del branches
        return 1
