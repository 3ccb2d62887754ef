"""Around: what stands around the experts of a layer, every token passing through it.

``DispatchProjection`` is what a row becomes before it travels and after it is home; ``SharedExpertBranch`` is a branch
that every token takes, and how its answer and the experts' are put together.

Letters: T tokens, D model dim, M dim of the rows that travel.
"""

from collections.abc import Mapping, Sequence

from pydantic import Field
from torch import nn

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor
from moesaic.moe.parameter_spec import ParameterSpec, feed_forward_parameter_specs
from moesaic.nn.feed_forward import DenseFeedForward, FeedForwardConfig
from moesaic.nn.initializer import CustomInitializers, Initializer


class SharedExpertBranch(Choice):
    """Family: the branch that every token takes beside its experts."""

    def build(self, *, feed_forward: FeedForwardConfig, dim: int, bias: bool) -> nn.Module:
        """Return a module of ``forward(x, *, mixed) -> out``; ``mixed`` is the experts' answer."""
        raise NotImplementedError

    def parameter_specs(
        self, *, feed_forward: FeedForwardConfig, dim: int, bias: bool
    ) -> Sequence[ParameterSpec]:
        """Return its parameters."""
        del feed_forward, dim, bias
        return ()

    def saved_activations(self, *, feed_forward: FeedForwardConfig, dim: int) -> float:
        """Return the values that autograd keeps per token (for forecasts)."""
        del feed_forward, dim
        return 0


class NoSharedExperts(SharedExpertBranch):
    """The experts' answer is the layer's."""

    def build(self, *, feed_forward: FeedForwardConfig, dim: int, bias: bool) -> nn.Module:
        del feed_forward, dim, bias
        return _NoBranch()


class _NoBranch(nn.Module):
    def forward(
        self, x: Float[Tensor, "T D"], *, routed_output: Float[Tensor, "T D"]
    ) -> Float[Tensor, "T D"]:
        del x
        return routed_output


class SharedExperts(SharedExpertBranch):
    """``number`` experts that every token takes, unweighted (DeepSeekMoE, 2401.06066, section 3.2).

    ``out = sum_i shared_i(x) + routed(x)``; K experts of the routed ones' width are one dense
    feed-forward of K times the width. With ``number=1`` it is the fixed feed-forward of a residual
    mixture as the paper's text has it (DeepSpeed-MoE, 2201.05596, section 4.1).
    """

    number: int = Field(default=1, ge=1)

    def build(self, *, feed_forward: FeedForwardConfig, dim: int, bias: bool) -> nn.Module:
        return _SharedBranch(side_by_side(feed_forward, self.number), dim=dim, bias=bias)

    def parameter_specs(
        self, *, feed_forward: FeedForwardConfig, dim: int, bias: bool
    ) -> Sequence[ParameterSpec]:
        return feed_forward_parameter_specs(
            side_by_side(feed_forward, self.number), dim=dim, bias=bias
        )

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

    def parameter_specs(
        self, *, feed_forward: FeedForwardConfig, dim: int, bias: bool
    ) -> Sequence[ParameterSpec]:
        shared = feed_forward_parameter_specs(
            side_by_side(feed_forward, self.number), dim=dim, bias=bias
        )
        return [*shared, ParameterSpec("router", (1, dim))]

    def saved_activations(self, *, feed_forward: FeedForwardConfig, dim: int) -> float:
        return (
            feed_forward.activation.saved_activations * self.number * feed_forward.hidden + dim + 1
        )


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


class ResidualExpert(SharedExpertBranch):
    """A fixed feed-forward of an expert's width, mixed with the experts by two learned weights.

    ``out = c_1 moe(x) + c_2 mlp(x)`` with ``c = softmax(W x + b)`` in R^2: Residual-MoE
    (DeepSpeed-MoE, 2201.05596, section 4.1) as the released code has it (``coefficient``, with a
    bias whether or not the model has any). The plain sum is ``SharedExperts(number=1)``.
    """

    def build(self, *, feed_forward: FeedForwardConfig, dim: int, bias: bool) -> nn.Module:
        return _ResidualBranch(feed_forward, dim=dim, bias=bias)

    def parameter_specs(
        self, *, feed_forward: FeedForwardConfig, dim: int, bias: bool
    ) -> Sequence[ParameterSpec]:
        fixed = feed_forward_parameter_specs(feed_forward, dim=dim, bias=bias)
        return [*fixed, ParameterSpec("router", (2, dim)), ParameterSpec("bias", (2,))]

    def saved_activations(self, *, feed_forward: FeedForwardConfig, dim: int) -> float:
        return feed_forward.activation.saved_activations * feed_forward.hidden + 2 * dim + 2


class _ResidualBranch(CustomInitializers):
    def __init__(self, feed_forward: FeedForwardConfig, *, dim: int, bias: bool) -> None:
        super().__init__()
        self.feed_forward = DenseFeedForward(feed_forward, dim=dim, bias=bias)
        self.coefficient = nn.Linear(dim, 2)

    def initializers(self) -> Mapping[str, Initializer]:
        return {"coefficient.weight": Initializer(kind="router")}

    def forward(
        self, x: Float[Tensor, "T D"], *, routed_output: Float[Tensor, "T D"]
    ) -> Float[Tensor, "T D"]:
        share = self.coefficient(x).softmax(-1, dtype=routed_output.dtype)
        return share[:, :1] * routed_output + share[:, 1:] * self.feed_forward(x)
