"""Shared experts: always on, beside the routed ones.

Letters: T tokens, D model dim.
"""

from collections.abc import Mapping, Sequence

from pydantic import Field
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.around import Beside
from moesaic.moe.pieces import Piece
from moesaic.nn.feed_forward import DenseFeedForward, FeedForwardConfig
from moesaic.nn.start import CustomInitializers, Initializer


class SharedExperts(Beside):
    """``number`` experts that every token takes, unweighted (DeepSeekMoE, 2401.06066, section 3.2).

    ``out = sum_i shared_i(x) + routed(x)``; K experts of the routed ones' width are one dense
    feed-forward of K times the width. With ``number=1`` it is the fixed feed-forward of a residual
    mixture as the paper's text has it (DeepSpeed-MoE, 2201.05596, section 4.1).
    """

    number: int = Field(default=1, ge=1)

    def build(self, *, feed_forward: FeedForwardConfig, dim: int, bias: bool) -> nn.Module:
        return _Shared(widened(feed_forward, self.number), dim=dim, bias=bias)

    def pieces(self, *, feed_forward: FeedForwardConfig, dim: int, bias: bool) -> Sequence[Piece]:
        return dense_pieces(widened(feed_forward, self.number), dim=dim, bias=bias)

    def kept(self, *, feed_forward: FeedForwardConfig, dim: int) -> float:
        del dim
        return feed_forward.activation.saved_activations * self.number * feed_forward.hidden


class GatedSharedExperts(Beside):
    """Shared experts times ``sigmoid(w x)``, one number per token.

    As in the released code of Qwen's mixtures (``shared_expert_gate``: linear, without a bias).
    """

    number: int = Field(default=1, ge=1)

    def build(self, *, feed_forward: FeedForwardConfig, dim: int, bias: bool) -> nn.Module:
        return _GatedShared(widened(feed_forward, self.number), dim=dim, bias=bias)

    def pieces(self, *, feed_forward: FeedForwardConfig, dim: int, bias: bool) -> Sequence[Piece]:
        shared = dense_pieces(widened(feed_forward, self.number), dim=dim, bias=bias)
        return [*shared, Piece("router", (1, dim))]

    def kept(self, *, feed_forward: FeedForwardConfig, dim: int) -> float:
        return feed_forward.activation.saved_activations * self.number * feed_forward.hidden + dim + 1


class _Shared(nn.Module):
    def __init__(self, feed_forward: FeedForwardConfig, *, dim: int, bias: bool) -> None:
        super().__init__()
        self.always = DenseFeedForward(feed_forward, dim=dim, bias=bias)

    def forward(
        self, x: Float[Tensor, "T D"], *, mixed: Float[Tensor, "T D"]
    ) -> Float[Tensor, "T D"]:
        return mixed + self.always(x)


class _GatedShared(CustomInitializers):
    def __init__(self, feed_forward: FeedForwardConfig, *, dim: int, bias: bool) -> None:
        super().__init__()
        self.always = DenseFeedForward(feed_forward, dim=dim, bias=bias)
        self.gate = nn.Linear(dim, 1, bias=False)

    def initializers(self) -> Mapping[str, Initializer]:
        return {"gate.weight": Initializer(kind="router")}

    def forward(
        self, x: Float[Tensor, "T D"], *, mixed: Float[Tensor, "T D"]
    ) -> Float[Tensor, "T D"]:
        return mixed + self.gate(x).sigmoid() * self.always(x)


def widened(feed_forward: FeedForwardConfig, number: int) -> FeedForwardConfig:
    """Return the feed-forward that ``number`` of these are, side by side."""
    return feed_forward.replace(hidden=number * feed_forward.hidden)


def dense_pieces(feed_forward: FeedForwardConfig, *, dim: int, bias: bool) -> list[Piece]:
    """Return the parameters of a dense feed-forward."""
    width = feed_forward.activation.width(feed_forward.hidden)
    pieces = [Piece("matrix", (width, dim)), Piece("matrix", (dim, feed_forward.hidden))]
    return [*pieces, Piece("bias", (width,)), Piece("bias", (dim,))] if bias else pieces
