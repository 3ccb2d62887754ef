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
from moesaic.nn.feed_forward import FeedForwardConfig


class Passage(nn.Module):
    """The way out and home of a layer's rows; this one changes nothing."""

    def enter(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T M"]:
        """Return what travels."""
        return x

    def leave(self, y: Float[Tensor, "T M"]) -> Float[Tensor, "T D"]:
        """Return what came home as the model reads it."""
        return y


class Exchange(Choice):
    """Family: the form in which rows travel between ranks."""

    def dim(self, dim: int) -> int:
        """Return M for a model dim: what experts read and write."""
        raise NotImplementedError

    def build(self, *, dim: int) -> Passage:
        """Return the way of a layer's rows."""
        raise NotImplementedError

    def pieces(self, *, dim: int) -> Sequence[Piece]:
        """Return its parameters."""
        del dim
        return ()

    def kept(self, *, dim: int) -> float:
        """Return the values that autograd keeps per token (for forecasts)."""
        del dim
        return 0


class Whole(Exchange):
    """Rows travel as they are."""

    def dim(self, dim: int) -> int:
        return dim

    def build(self, *, dim: int) -> Passage:
        del dim
        return Passage()


class Beside(Choice):
    """Family: the branch that every token takes beside its experts."""

    def build(self, *, feed_forward: FeedForwardConfig, dim: int, bias: bool) -> nn.Module:
        """Return a module of ``forward(x, *, mixed) -> out``; ``mixed`` is the experts' answer."""
        raise NotImplementedError

    def pieces(self, *, feed_forward: FeedForwardConfig, dim: int, bias: bool) -> Sequence[Piece]:
        """Return its parameters."""
        del feed_forward, dim, bias
        return ()

    def kept(self, *, feed_forward: FeedForwardConfig, dim: int) -> float:
        """Return the values that autograd keeps per token (for forecasts)."""
        del feed_forward, dim
        return 0


class NothingBeside(Beside):
    """The experts' answer is the layer's."""

    def build(self, *, feed_forward: FeedForwardConfig, dim: int, bias: bool) -> nn.Module:
        del feed_forward, dim, bias
        return _Alone()


class _Alone(nn.Module):
    def forward(
        self, x: Float[Tensor, "T D"], *, mixed: Float[Tensor, "T D"]
    ) -> Float[Tensor, "T D"]:
        del x
        return mixed
