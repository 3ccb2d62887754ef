"""Mixture: everything between routing and an MoE layer's output, as one operation.

The definition is a sum over edges: ``out[t] = sum of weight[n] * feed_forward[expert[n]](x[t])``
over the edges n that leave t. ``Composed`` builds it from ``spread``, ``grouped_feed_forward`` and
``combine`` and is the plain twin of every fused ``Mixer``. ``ops/choose.py`` picks one.

Letters: T tokens, N edges, E experts, D model dim, F feed-forward dim.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.ops.combine import combine, spread
from moesaic.ops.group import Groups
from moesaic.ops.grouped import Activation, Banks, Engine, grouped_feed_forward


@dataclass(frozen=True, slots=True)
class Edges:
    """Which rows go to which expert and come home with what weight.

    ``groups`` sorts the edges by expert; edges that lead nowhere are past ``groups.ends[-1]``.
    ``per_token`` is K if every token has K edges in token-major order, else 0. Weights are float32.
    """

    token: Int[Tensor, "N"]
    weight: Float[Tensor, "N"]
    groups: Groups
    num_tokens: int
    per_token: int


@runtime_checkable
class Mixer(Protocol):
    """A way to compute the mixture, differentiable in ``x``, ``edges.weight`` and the banks."""

    @property
    def name(self) -> str: ...

    def __call__(
        self, x: Float[Tensor, "T D"], *, edges: Edges, banks: Banks, activation: Activation
    ) -> Float[Tensor, "T D"]: ...

    def kept(self, *, dim: int, width: int, bias: bool, live: float) -> float:
        """Values of four bytes that autograd keeps per edge, x left out (for forecasts).

        ``live`` is the share of edges that lead somewhere.
        """
        ...


@dataclass(frozen=True, slots=True)
class Composed:
    """Carry rows, multiply segments with ``engine``, carry home: three operations."""

    engine: Engine

    @property
    def name(self) -> str:
        return f"composed ({self.engine.name})"

    def __call__(
        self, x: Float[Tensor, "T D"], *, edges: Edges, banks: Banks, activation: Activation
    ) -> Float[Tensor, "T D"]:
        rows = carry_out(x, edges=edges)
        y = grouped_feed_forward(
            rows, banks=banks, groups=edges.groups, activation=activation, engine=self.engine
        )
        return carry_home(y, edges=edges)

    def kept(self, *, dim: int, width: int, bias: bool, live: float) -> float:
        """The row, the pre-activation, the answer and a few numbers of each edge."""
        del bias, live
        return 2 * dim + width + 4


def carry_out(x: Float[Tensor, "T D"], *, edges: Edges) -> Float[Tensor, "N D"]:
    """Copy each token's row to the sorted places of its edges."""
    return spread(x, token=edges.token, groups=edges.groups, per_token=edges.per_token)


def carry_home(y: Float[Tensor, "N D"], *, edges: Edges) -> Float[Tensor, "T D"]:
    """Add the sorted rows to their tokens, each times its edge's weight."""
    return combine(
        y,
        token=edges.token,
        weight=edges.weight,
        groups=edges.groups,
        num_tokens=edges.num_tokens,
        per_token=edges.per_token,
    )
