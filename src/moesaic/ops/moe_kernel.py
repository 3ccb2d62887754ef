"""MoE kernel: everything between routing and the output of an MoE layer, as one operation.

Definition: ``out[t] = sum of weight[n] * feed_forward[expert[n]](x[t])`` over the edges n of token
t. ``UnfusedMoEKernel`` composes permute, grouped feed-forward and unpermute, and is the reference
for the fused kernels. ``ops/kernel_selection.py`` selects a kernel.

Letters: T tokens, N edges, E experts, D model dim, F feed-forward dim.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.ops.grouped_gemm import (
    ActivationFunction,
    FeedForwardWeights,
    GroupedGEMM,
    SequentialGEMM,
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


class KernelShape(NamedTuple):
    """Model dim, pre-activation width and bias of experts, and the share of edges not dropped."""

    dim: int
    width: int
    bias: bool
    live_share: float


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

    def saved_activations(self, shape: KernelShape) -> float:
        """Four-byte values that autograd saves per edge, without ``x`` (for memory estimates)."""
        ...


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

    def saved_activations(self, shape: KernelShape) -> float:
        """The row, the pre-activation, the expert output and a few numbers of each edge."""
        return 2 * shape.dim + shape.width + 4


class KernelMemory(Protocol):
    """What estimates need of an ``MoEKernel``."""

    def saved_activations(self, shape: KernelShape) -> float: ...


@dataclass(frozen=True, slots=True)
class FusedMemory:
    """The memory of the fused kernels, on any machine: an estimate compiles and runs nothing."""

    def saved_activations(self, shape: KernelShape) -> float:
        """The pre-activation of edges that are not dropped, the weight, and three int64 indices."""
        if shape.bias:  # biases go to the unfused kernel
            return UnfusedMoEKernel(SequentialGEMM()).saved_activations(shape)
        return shape.live_share * shape.width + 1 + 3 * 2


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
