"""Mixture: everything between routing and an MoE layer's output, as one operation.

The definition is a sum over edges: ``out[t] = sum of weight[n] * feed_forward[expert[n]](x[t])``
over the edges n that leave t. ``UnfusedMoEKernel`` builds it from ``spread``, ``grouped_feed_forward`` and
``combine`` and is the plain twin of every fused ``MoEKernel``. ``ops/kernel_selection.py`` picks one.

Letters: T tokens, N edges, E experts, D model dim, F feed-forward dim.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.ops.grouped_gemm import (
    ActivationFunction,
    FeedForwardWeights,
    GroupedGEMM,
    grouped_feed_forward,
)
from moesaic.ops.permute import RowGroups, permute, unpermute


@dataclass(frozen=True, slots=True)
class Edges:
    """Which rows go to which expert and come home with what weight.

    ``groups`` sorts the edges by expert; edges that lead nowhere are past ``groups.ends[-1]``.
    ``per_token`` is K if every token has K edges in token-major order, else 0. Weights are float32.
    """

    token: Int[Tensor, "N"]
    weight: Float[Tensor, "N"]
    groups: RowGroups
    num_tokens: int
    per_token: int


@runtime_checkable
class MoEKernel(Protocol):
    """A way to compute the mixture, differentiable in ``x``, ``edges.weight`` and the banks."""

    @property
    def name(self) -> str: ...

    def __call__(
        self,
        x: Float[Tensor, "T D"],
        *,
        edges: Edges,
        weights: FeedForwardWeights,
        activation: ActivationFunction,
    ) -> Float[Tensor, "T D"]: ...

    def saved_activations(self, *, dim: int, width: int, bias: bool, live_share: float) -> float:
        """Values of four bytes that autograd keeps per edge, x left out (for forecasts).

        ``live`` is the share of edges that lead somewhere.
        """
        ...


@dataclass(frozen=True, slots=True)
class UnfusedMoEKernel:
    """Carry rows, multiply segments with ``engine``, carry home: three operations."""

    gemm: GroupedGEMM

    @property
    def name(self) -> str:
        return f"composed ({self.gemm.name})"

    def __call__(
        self,
        x: Float[Tensor, "T D"],
        *,
        edges: Edges,
        weights: FeedForwardWeights,
        activation: ActivationFunction,
    ) -> Float[Tensor, "T D"]:
        rows = permute_tokens(x, edges=edges)
        y = grouped_feed_forward(
            rows, weights=weights, groups=edges.groups, activation=activation, gemm=self.gemm
        )
        return unpermute_tokens(y, edges=edges)

    def saved_activations(self, *, dim: int, width: int, bias: bool, live_share: float) -> float:
        """The row, the pre-activation, the answer and a few numbers of each edge."""
        del bias, live_share
        return 2 * dim + width + 4


def permute_tokens(x: Float[Tensor, "T D"], *, edges: Edges) -> Float[Tensor, "N D"]:
    """Copy each token's row to the sorted places of its edges."""
    return permute(x, token=edges.token, groups=edges.groups, per_token=edges.per_token)


def unpermute_tokens(y: Float[Tensor, "N D"], *, edges: Edges) -> Float[Tensor, "T D"]:
    """Add the sorted rows to their tokens, each times its edge's weight."""
    return unpermute(
        y,
        token=edges.token,
        weight=edges.weight,
        groups=edges.groups,
        num_tokens=edges.num_tokens,
        per_token=edges.per_token,
    )
