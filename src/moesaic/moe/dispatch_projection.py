"""Dispatch projection: a projection of token rows to a smaller dim before they are dispatched.

Letters: T tokens, D model dim, M dim of the dispatched rows.
"""

from collections.abc import Sequence

from pydantic import Field
from torch import nn

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor
from moesaic.nn.parameter_spec import ParameterSpec


class DispatchProjection(Choice):
    """Family: the projection of rows between the model dim and the dim of the experts."""

    def expert_dim(self, dim: int) -> int:
        """Return M for a model dim: what experts read and write."""
        return dim

    def build(self, _dim: int, /) -> "DownUpProjection | None":
        """Return the module with both projections; None without one."""
        return None

    def parameter_specs(self, _dim: int, /) -> Sequence[ParameterSpec]:
        """Return its parameters."""
        return ()


class NoDispatchProjection(DispatchProjection):
    """Rows are dispatched at the model dim."""


class DownProjection(DispatchProjection):
    """Down-projection before dispatch, up-projection after combine (BigMac, 2502.16927).

    ``M = ratio * D``. All experts of a layer share one projection from D to M before dispatch and
    one from M to D after combine; the experts are feed-forwards of dim M. The volume of the
    all-to-all is ``ratio`` times that of full rows. The router and the shared experts read full
    rows. That the projections have no bias and no norm is our reading.
    """

    ratio: float = Field(default=0.25, gt=0, le=1)

    def expert_dim(self, dim: int) -> int:
        return max(1, round(dim * self.ratio))

    def build(self, dim: int, /) -> "DownUpProjection | None":
        return DownUpProjection(dim=dim, expert_dim=self.expert_dim(dim))

    def parameter_specs(self, dim: int, /) -> Sequence[ParameterSpec]:
        small = self.expert_dim(dim)
        return [ParameterSpec("matrix", (small, dim)), ParameterSpec("matrix", (dim, small))]


class DownUpProjection(nn.Module):
    """The projections before dispatch (``down``) and after combine (``up``)."""

    def __init__(self, *, dim: int, expert_dim: int) -> None:
        super().__init__()
        self.descend = nn.Linear(dim, expert_dim, bias=False)
        self.ascend = nn.Linear(expert_dim, dim, bias=False)

    def down(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T M"]:
        """Return the rows to dispatch."""
        return self.descend(x)

    def up(self, y: Float[Tensor, "T M"]) -> Float[Tensor, "T D"]:
        """Return the combined rows at the model dim."""
        return self.ascend(y)
