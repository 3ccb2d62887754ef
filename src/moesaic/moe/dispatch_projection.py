"""Around: what stands around the experts of a layer, every token passing through it.

``DispatchProjection`` is what a row becomes before it travels and after it is home; ``SharedExpertBranch`` is a branch
that every token takes, and how its answer and the experts' are put together.

Letters: T tokens, D model dim, M dim of the rows that travel.
"""

from collections.abc import Sequence

from pydantic import Field
from torch import nn

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor
from moesaic.moe.parameter_spec import ParameterSpec


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


class DownProjection(DispatchProjection):
    """Descend, communicate, communicate, ascend: BigMac (2502.16927), ``M = ratio * D``.

    One map D to M before rows travel and one M to D after they are home, each shared by all experts
    of a layer; experts are feed-forwards of dim M, up first. Bytes that travel are ``ratio`` times
    those of whole rows. The router reads whole rows, and so does what stands beside the experts.
    That the maps have no bias and no norm is our reading.
    """

    ratio: float = Field(default=0.25, gt=0, le=1)

    def expert_dim(self, dim: int) -> int:
        return max(1, round(dim * self.ratio))

    def build(self, *, dim: int) -> IdentityProjection:
        return _LinearProjection(dim=dim, narrow=self.expert_dim(dim))

    def parameter_specs(self, *, dim: int) -> Sequence[ParameterSpec]:
        narrow = self.expert_dim(dim)
        return [ParameterSpec("matrix", (narrow, dim)), ParameterSpec("matrix", (dim, narrow))]

    def saved_activations(self, *, dim: int) -> float:
        return self.expert_dim(dim)


class _LinearProjection(IdentityProjection):
    def __init__(self, *, dim: int, narrow: int) -> None:
        super().__init__()
        self.descend = nn.Linear(dim, narrow, bias=False)
        self.ascend = nn.Linear(narrow, dim, bias=False)

    def project(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T M"]:
        return self.descend(x)

    def unproject(self, y: Float[Tensor, "T M"]) -> Float[Tensor, "T D"]:
        return self.ascend(y)
