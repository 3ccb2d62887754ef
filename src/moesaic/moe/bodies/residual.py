"""Residual: experts as a correction to a fixed feed-forward.

Letters: T tokens, D model dim.
"""

from collections.abc import Mapping, Sequence

from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.around import SharedExpertBranch
from moesaic.moe.bodies.shared import feed_forward_parameter_specs
from moesaic.moe.pieces import ParameterSpec
from moesaic.nn.feed_forward import DenseFeedForward, FeedForwardConfig
from moesaic.nn.start import CustomInitializers, Initializer


class ResidualExpert(SharedExpertBranch):
    """A fixed feed-forward of an expert's width, mixed with the experts by two learned weights.

    ``out = c_1 moe(x) + c_2 mlp(x)`` with ``c = softmax(W x + b)`` in R^2: Residual-MoE
    (DeepSpeed-MoE, 2201.05596, section 4.1) as the released code has it (``coefficient``, with a
    bias whether or not the model has any). The plain sum is ``SharedExperts(number=1)``.
    """

    def build(self, *, feed_forward: FeedForwardConfig, dim: int, bias: bool) -> nn.Module:
        return _ResidualBranch(feed_forward, dim=dim, bias=bias)

    def parameter_specs(self, *, feed_forward: FeedForwardConfig, dim: int, bias: bool) -> Sequence[ParameterSpec]:
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
