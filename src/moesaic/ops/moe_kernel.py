"""MoE kernel: everything between routing and the output of an MoE layer, as one operation.

Definition: ``out[t] = sum of weight[n] * feed_forward[expert[n]](x[t])`` over the edges n of token
t. ``UnfusedMoEKernel`` composes permute, grouped feed-forward and unpermute, and is the reference
for the fused kernels. ``ops/kernel_selection.py`` selects a kernel.

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
    """The edge list of a layer on this rank: one edge per (token, expert) pair.

    ``groups`` sorts the edges by expert; dropped edges are past ``groups.offsets[-1]``.
    ``per_token`` is K if every token has K edges in token-major order, else 0. Weights are float32.
    """

    token: Int[Tensor, "N"]
    weight: Float[Tensor, "N"]
    groups: RowGroups
    num_tokens: int
    per_token: int


@runtime_checkable
class MoEKernel(Protocol):
    """Computes an MoE layer; differentiable in ``x``, ``edges.weight`` and the weights."""

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


@dataclass(frozen=True, slots=True)
class UnfusedMoEKernel:
    """Permute, grouped feed-forward with ``gemm``, unpermute: three operations."""

    gemm: GroupedGEMM

    @property
    def name(self) -> str:
        return f"unfused ({self.gemm.name})"

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


def permute_tokens(x: Float[Tensor, "T D"], *, edges: Edges) -> Float[Tensor, "N D"]:
    """Copy each token's row to the sorted positions of its edges."""
    return permute(x, token=edges.token, groups=edges.groups, per_token=edges.per_token)


def unpermute_tokens(y: Float[Tensor, "N D"], *, edges: Edges) -> Float[Tensor, "T D"]:
    """Sum each token's sorted rows, each times the weight of its edge."""
    return unpermute(
        y,
        token=edges.token,
        weight=edges.weight,
        groups=edges.groups,
        num_tokens=edges.num_tokens,
        per_token=edges.per_token,
    )
