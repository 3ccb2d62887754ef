"""Around: what stands around the experts of a layer, every token passing through it.

``Exchange`` is what a row becomes before it travels and after it is home; ``Beside`` is a branch
that every token takes, and how its answer and the experts' are put together.

Letters: T tokens, D model dim, M dim of the rows that travel.
"""

from collections.abc import Sequence

from torch import nn

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor
from moesaic.moe.pieces import ParameterSpec
from moesaic.nn.feed_forward import FeedForwardConfig


class IdentityProjection(nn.Module):
    """The way out and home of a layer's rows; this one changes nothing."""

    def project(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T M"]:
        """Return what travels."""
        return x

    def unproject(self, y: Float[Tensor, "T M"]) -> Float[Tensor, "T D"]:
        """Return what came home as the model reads it."""
        return y


class DispatchProjection(Choice):
    """Family: the form in which rows travel between ranks."""

    def expert_dim(self, dim: int) -> int:
        """Return M for a model dim: what experts read and write."""
        raise NotImplementedError

    def build(self, *, dim: int) -> IdentityProjection:
        """Return the way of a layer's rows."""
        raise NotImplementedError

    def parameter_specs(self, *, dim: int) -> Sequence[ParameterSpec]:
        """Return its parameters."""
        del dim
        return ()

    def saved_activations(self, *, dim: int) -> float:
        """Return the values that autograd keeps per token (for forecasts)."""
        del dim
        return 0


class NoDispatchProjection(DispatchProjection):
    """Rows travel as they are."""

    def expert_dim(self, dim: int) -> int:
        return dim

    def build(self, *, dim: int) -> IdentityProjection:
        del dim
        return IdentityProjection()


class SharedExpertBranch(Choice):
    """Family: the branch that every token takes beside its experts."""

    def build(self, *, feed_forward: FeedForwardConfig, dim: int, bias: bool) -> nn.Module:
        """Return a module of ``forward(x, *, mixed) -> out``; ``mixed`` is the experts' answer."""
        raise NotImplementedError

    def parameter_specs(self, *, feed_forward: FeedForwardConfig, dim: int, bias: bool) -> Sequence[ParameterSpec]:
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
