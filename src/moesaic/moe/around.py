"""Around: what stands around the experts of a layer, every token passing through it.

``Exchange`` is what a row becomes before it travels and after it is home; ``Beside`` is a branch
that every token takes, and how its answer and the experts' are put together.

Letters: T tokens, D model dim, M dim of the rows that travel.
"""

from collections.abc import Sequence

from torch import nn

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor
from moesaic.moe.pieces import Piece
from moesaic.nn.feed_forward import FeedForward


class Exchange(Choice):
    """Family: the form in which rows travel between ranks."""

    def dim(self, dim: int) -> int:
        """Return M for a model dim: what experts read and write."""
        raise NotImplementedError

    def build(self, *, dim: int) -> nn.Module:
        """Return a module with ``enter(x [T D]) -> [T M]`` and ``leave(y [T M]) -> [T D]``."""
        raise NotImplementedError

    def pieces(self, *, dim: int) -> Sequence[Piece]:
        """Return its parameters."""
        del dim
        return ()


class Whole(Exchange):
    """Rows travel as they are."""

    def dim(self, dim: int) -> int:
        return dim

    def build(self, *, dim: int) -> nn.Module:
        del dim
        return _Whole()


class _Whole(nn.Module):
    def enter(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return x

    def leave(self, y: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return y


class Beside(Choice):
    """Family: the branch that every token takes beside its experts."""

    def build(self, *, feed_forward: FeedForward, dim: int, bias: bool) -> nn.Module:
        """Return a module of ``forward(x, *, mixed) -> out``; ``mixed`` is the experts' answer."""
        raise NotImplementedError

    def pieces(self, *, feed_forward: FeedForward, dim: int, bias: bool) -> Sequence[Piece]:
        """Return its parameters."""
        del feed_forward, dim, bias
        return ()


class NothingBeside(Beside):
    """The experts' answer is the layer's."""

    def build(self, *, feed_forward: FeedForward, dim: int, bias: bool) -> nn.Module:
        del feed_forward, dim, bias
        return _Alone()


class _Alone(nn.Module):
    def forward(
        self, x: Float[Tensor, "T D"], *, mixed: Float[Tensor, "T D"]
    ) -> Float[Tensor, "T D"]:
        del x
        return mixed
