"""Shared experts: always on, beside the routed ones.

Letters: T tokens, D model dim.
"""

from collections.abc import Mapping, Sequence

from pydantic import Field
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.around import SharedExpertBranch
from moesaic.moe.pieces import ParameterSpec
from moesaic.nn.feed_forward import DenseFeedForward, FeedForwardConfig
from moesaic.nn.start import CustomInitializers, Initializer


class SharedExperts(SharedExpertBranch):
    """``number`` experts that every token takes, unweighted (DeepSeekMoE, 2401.06066, section 3.2).

    ``out = sum_i shared_i(x) + routed(x)``; K experts of the routed ones' width are one dense
    feed-forward of K times the width. With ``number=1`` it is the fixed feed-forward of a residual
    mixture as the paper's text has it (DeepSpeed-MoE, 2201.05596, section 4.1).
    """

    number: int = Field(default=1, ge=1)

    def build(self, *, feed_forward: FeedForwardConfig, dim: int, bias: bool) -> nn.Module:
        return _SharedBranch(side_by_side(feed_forward, self.number), dim=dim, bias=bias)

    def parameter_specs(self, *, feed_forward: FeedForwardConfig, dim: int, bias: bool) -> Sequence[ParameterSpec]:
        return feed_forward_parameter_specs(side_by_side(feed_forward, self.number), dim=dim, bias=bias)

    def saved_activations(self, *, feed_forward: FeedForwardConfig, dim: int) -> float:
        del dim
        return feed_forward.activation.saved_activations * self.number * feed_forward.hidden


class GatedSharedExperts(SharedExpertBranch):
    """Shared experts times ``sigmoid(w x)``, one number per token.

    As in the released code of Qwen's mixtures (``shared_expert_gate``: linear, without a bias).
    """

    number: int = Field(default=1, ge=1)

    def build(self, *, feed_forward: FeedForwardConfig, dim: int, bias: bool) -> nn.Module:
        return _GatedSharedBranch(side_by_side(feed_forward, self.number), dim=dim, bias=bias)

    def parameter_specs(self, *, feed_forward: FeedForwardConfig, dim: int, bias: bool) -> Sequence[ParameterSpec]:
        shared = feed_forward_parameter_specs(side_by_side(feed_forward, self.number), dim=dim, bias=bias)
        return [*shared, ParameterSpec("router", (1, dim))]

    def saved_activations(self, *, feed_forward: FeedForwardConfig, dim: int) -> float:
        return feed_forward.activation.saved_activations * self.number * feed_forward.hidden + dim + 1


class _SharedBranch(nn.Module):
    def __init__(self, feed_forward: FeedForwardConfig, *, dim: int, bias: bool) -> None:
        super().__init__()
        self.feed_forward = DenseFeedForward(feed_forward, dim=dim, bias=bias)

    def forward(
        self, x: Float[Tensor, "T D"], *, routed_output: Float[Tensor, "T D"]
    ) -> Float[Tensor, "T D"]:
        return routed_output + self.feed_forward(x)


class _GatedSharedBranch(CustomInitializers):
    def __init__(self, feed_forward: FeedForwardConfig, *, dim: int, bias: bool) -> None:
        super().__init__()
        self.feed_forward = DenseFeedForward(feed_forward, dim=dim, bias=bias)
        self.gate = nn.Linear(dim, 1, bias=False)

    def initializers(self) -> Mapping[str, Initializer]:
        return {"gate.weight": Initializer(kind="router")}

    def forward(
        self, x: Float[Tensor, "T D"], *, routed_output: Float[Tensor, "T D"]
    ) -> Float[Tensor, "T D"]:
        return routed_output + self.gate(x).sigmoid() * self.feed_forward(x)


def side_by_side(feed_forward: FeedForwardConfig, number: int) -> FeedForwardConfig:
    """Return the feed-forward that ``number`` of these are, side by side."""
    return feed_forward.replace(hidden=number * feed_forward.hidden)


def feed_forward_parameter_specs(feed_forward: FeedForwardConfig, *, dim: int, bias: bool) -> list[ParameterSpec]:
    """Return the parameters of a dense feed-forward."""
    width = feed_forward.activation.width(feed_forward.hidden)
    pieces = [ParameterSpec("matrix", (width, dim)), ParameterSpec("matrix", (dim, feed_forward.hidden))]
    return [*pieces, ParameterSpec("bias", (width,)), ParameterSpec("bias", (dim,))] if bias else pieces
