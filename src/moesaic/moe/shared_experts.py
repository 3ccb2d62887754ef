"""Shared experts: a dense branch that every token takes beside its routed experts.

Letters: T tokens, D model dim.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from pydantic import Field
from torch import nn

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor
from moesaic.nn.feed_forward import DenseFeedForward
from moesaic.nn.initializer import CustomInitializers, Initializer
from moesaic.nn.parameter_spec import FeedForwardShape, ParameterSpec


class SharedExpertBranch(Choice):
    """Family: the dense branch of an MoE layer. Shapes are those of one expert."""

    def build(self, _shape: FeedForwardShape, /) -> nn.Module | None:
        """Return a module of ``forward(x, *, routed_output) -> out``; None without a branch."""
        return None

    def parameter_specs(self, _shape: FeedForwardShape, /) -> Sequence[ParameterSpec]:
        """Return its parameters."""
        return ()


class NoSharedExperts(SharedExpertBranch):
    """Routed experts only."""


class SharedExperts(SharedExpertBranch):
    """``number`` experts that every token takes, unweighted (DeepSeekMoE, 2401.06066, section 3.2).

    ``out = sum_i shared_i(x) + routed(x)``; K experts are one dense feed-forward of K times the
    width of a routed expert. With ``number=1`` it is the fixed feed-forward of a residual mixture
    as in the paper's text (DeepSpeed-MoE, 2201.05596, section 4.1).
    """

    number: int = Field(default=1, ge=1)

    def build(self, shape: FeedForwardShape, /) -> nn.Module | None:
        return _SharedBranch(_widened(shape, self.number))

    def parameter_specs(self, shape: FeedForwardShape, /) -> Sequence[ParameterSpec]:
        return _widened(shape, self.number).parameter_specs()


class GatedSharedExperts(SharedExperts):
    """Shared experts times ``sigmoid(w x)``, one gate value per token.

    As in the released code of Qwen's mixtures (``shared_expert_gate``: linear, without a bias).
    """

    def build(self, shape: FeedForwardShape, /) -> nn.Module | None:
        return _GatedSharedBranch(_widened(shape, self.number))

    def parameter_specs(self, shape: FeedForwardShape, /) -> Sequence[ParameterSpec]:
        return [*super().parameter_specs(shape), ParameterSpec("router", (1, shape.dim))]


class ResidualExpert(SharedExpertBranch):
    """A dense feed-forward of an expert's width, mixed with the experts by two learned weights.

    ``out = c_1 moe(x) + c_2 mlp(x)`` with ``c = softmax(W x + b)`` in R^2: Residual-MoE
    (DeepSpeed-MoE, 2201.05596, section 4.1) as in the released code (``coefficient``, which has a
    bias whether or not the model has any). The plain sum is ``SharedExperts(number=1)``.
    """

    def build(self, shape: FeedForwardShape, /) -> nn.Module | None:
        return _ResidualBranch(shape)

    def parameter_specs(self, shape: FeedForwardShape, /) -> Sequence[ParameterSpec]:
        mixing = [ParameterSpec("router", (2, shape.dim)), ParameterSpec("bias", (2,))]
        return shape.parameter_specs() + mixing


class _SharedBranch(nn.Module):
    def __init__(self, shape: FeedForwardShape) -> None:
        super().__init__()
        self.feed_forward = _dense(shape)

    def forward(
        self, x: Float[Tensor, "T D"], *, routed_output: Float[Tensor, "T D"]
    ) -> Float[Tensor, "T D"]:
        return routed_output + self.feed_forward(x)


class _GatedSharedBranch(CustomInitializers):
    def __init__(self, shape: FeedForwardShape) -> None:
        super().__init__()
        self.feed_forward = _dense(shape)
        self.gate = nn.Linear(shape.dim, 1, bias=False)

    def initializers(self) -> Mapping[str, Initializer]:
        return {"gate.weight": Initializer(kind="router")}

    def forward(
        self, x: Float[Tensor, "T D"], *, routed_output: Float[Tensor, "T D"]
    ) -> Float[Tensor, "T D"]:
        return routed_output + self.gate(x).sigmoid() * self.feed_forward(x)


class _ResidualBranch(CustomInitializers):
    def __init__(self, shape: FeedForwardShape) -> None:
        super().__init__()
        self.feed_forward = _dense(shape)
        self.coefficient = nn.Linear(shape.dim, 2)

    def initializers(self) -> Mapping[str, Initializer]:
        return {"coefficient.weight": Initializer(kind="router")}

    def forward(
        self, x: Float[Tensor, "T D"], *, routed_output: Float[Tensor, "T D"]
    ) -> Float[Tensor, "T D"]:
        share = self.coefficient(x).softmax(-1, dtype=routed_output.dtype)
        return share[:, :1] * routed_output + share[:, 1:] * self.feed_forward(x)


def _dense(shape: FeedForwardShape) -> DenseFeedForward:
    return DenseFeedForward(shape.feed_forward, dim=shape.dim, bias=shape.bias)


def _widened(shape: FeedForwardShape, number: int) -> FeedForwardShape:
    """Return the shape of ``number`` feed-forwards as one, side by side."""
    return replace(shape, feed_forward=shape.feed_forward.replace(hidden=number * shape.hidden))
