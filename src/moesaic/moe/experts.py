"""Experts: one feed-forward each, held as banks of matrices and applied to rows sorted by expert.

Letters: E experts, R rows, D model dim, F hidden width (2F before a gated activation).

LoRA experts: one feed-forward that all share, and a low-rank change of it for each.

Letters: E experts, R rows, D model dim, F hidden width (2F before a gated activation), r rank.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import nn

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor
from moesaic.moe.parameter_spec import ParameterSpec, feed_forward_parameter_specs
from moesaic.nn.feed_forward import DenseFeedForward, FeedForwardConfig
from moesaic.nn.initializer import CustomInitializers, Initializer
from moesaic.ops.grouped_gemm import (
    ActivationFunction,
    FeedForwardWeights,
    grouped_feed_forward,
    grouped_matmul,
    zero_rows_past_groups,
)
from moesaic.ops.kernel_selection import select_grouped_gemm, select_moe_kernel
from moesaic.ops.moe_kernel import Edges, KernelShape, permute_tokens, unpermute_tokens
from moesaic.ops.permute import RowGroups


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """How many experts of which feed-forward, and the dim of the rows they read and write."""

    num_experts: int
    dim: int
    feed_forward: FeedForwardConfig
    bias: bool


class Expert(Choice):
    """Family: what an expert is. A member builds all experts of a layer at once."""

    def build(self, size: ExpertShape) -> "ExpertModule":
        """Return the experts of a layer."""
        raise NotImplementedError

    def parameter_specs(
        self, size: ExpertShape, *, active_fraction: float
    ) -> Sequence[ParameterSpec]:
        """Return their parameters; a token uses the share ``used`` of the banks."""
        raise NotImplementedError

    def saved_activations(
        self, size: ExpertShape, *, edges: float, live_fraction: float = 1.0
    ) -> float:
        """Return the values that autograd keeps per token of so many edges (for forecasts).

        Rows and answers of the edges are among them, the token's own state is not. ``live`` is the
        share of edges that lead somewhere.
        """
        raise NotImplementedError


class ExpertModule(nn.Module):
    """Base of modules that hold the experts of a layer (see ``dispatch.ExpertCompute``)."""

    def forward(self, rows: Float[Tensor, "R D"], *, groups: RowGroups) -> Float[Tensor, "R D"]:
        """Apply each row's expert; rows past the groups come out as zero."""
        raise NotImplementedError

    def forward_edges(self, x: Float[Tensor, "T D"], *, edges: Edges) -> Float[Tensor, "T D"]:
        """Return each token's weighted sum of its experts' answers.

        By definition: ``unpermute_tokens(self(carry_out(x)))``; a bank that can do it in one go does.
        """
        rows = permute_tokens(x, edges=edges)
        return unpermute_tokens(self.forward(rows, groups=edges.groups), edges=edges)

    def in_one_call(
        self, x: Float[Tensor, "T D"], *, function: Callable[[Tensor, Any], Tensor]
    ) -> Float[Tensor, "T D"]:
        """Return ``work(x, experts)`` for experts whose calls run no hooks of this module."""
        return function(x, _WithoutHooks(self))


class _WithoutHooks:
    """A bank as its class defines it, whatever was hung on the instance."""

    def __init__(self, bank: ExpertModule) -> None:
        self._bank = bank

    def __call__(self, rows: Float[Tensor, "R D"], *, groups: RowGroups) -> Float[Tensor, "R D"]:
        return type(self._bank).forward(self._bank, rows, groups=groups)

    def forward_edges(self, x: Float[Tensor, "T D"], *, edges: Edges) -> Float[Tensor, "T D"]:
        return type(self._bank).forward_edges(self._bank, x, edges=edges)

    def in_one_call(
        self, x: Float[Tensor, "T D"], *, function: Callable[[Tensor, Any], Tensor]
    ) -> Float[Tensor, "T D"]:
        return function(x, self)


class FeedForwardExpert(Expert):
    """Two products with an activation between, a pair of matrices per expert."""

    def build(self, size: ExpertShape) -> "GroupedExperts":
        return GroupedExperts(size)

    def parameter_specs(
        self, size: ExpertShape, *, active_fraction: float
    ) -> Sequence[ParameterSpec]:
        experts, feed = size.num_experts, size.feed_forward
        width = feed.activation.width(feed.hidden)
        banks = [
            ParameterSpec("expert", (experts, size.dim, width), active_fraction),
            ParameterSpec("expert", (experts, feed.hidden, size.dim), active_fraction),
        ]
        if size.bias:
            banks.append(ParameterSpec("bias", (experts, width), active_fraction))
            banks.append(ParameterSpec("bias", (experts, size.dim), active_fraction))
        return banks

    def saved_activations(
        self, size: ExpertShape, *, edges: float, live_fraction: float = 1.0
    ) -> float:
        feed = size.feed_forward
        kernel = select_moe_kernel(torch.empty(0), activation=feed.activation)  # of this machine
        width = feed.activation.width(feed.hidden)
        shape = KernelShape(size.dim, width, size.bias, live_fraction)
        return edges * kernel.saved_activations(shape)


class GroupedExperts(ExpertModule):
    """``up`` [E, D, F] and ``down`` [E, F, D]: rows are multiplied from the left."""

    def __init__(self, size: ExpertShape) -> None:
        super().__init__()
        experts, feed = size.num_experts, size.feed_forward
        width = feed.activation.width(feed.hidden)
        self.up = nn.Parameter(torch.empty(experts, size.dim, width))
        self.down = nn.Parameter(torch.empty(experts, feed.hidden, size.dim))
        if size.bias:
            self.up_bias = nn.Parameter(torch.zeros(experts, width))
            self.down_bias = nn.Parameter(torch.zeros(experts, size.dim))
        self.activation, self.bias = feed.activation, size.bias

    def forward(self, rows: Float[Tensor, "R D"], *, groups: RowGroups) -> Float[Tensor, "R D"]:
        return FunctionalExperts(self.weights, self.activation)(rows, groups=groups)

    def forward_edges(self, x: Float[Tensor, "T D"], *, edges: Edges) -> Float[Tensor, "T D"]:
        return FunctionalExperts(self.weights, self.activation).forward_edges(x, edges=edges)

    @property
    def weights(self) -> FeedForwardWeights:
        biases = (self.up_bias, self.down_bias) if self.bias else (None, None)
        return FeedForwardWeights(self.up, self.down, *biases)


@dataclass(frozen=True, slots=True)
class FunctionalExperts:
    """What a bank of feed-forwards computes, for matrices that need not be its own."""

    weights: FeedForwardWeights
    activation: ActivationFunction

    def __call__(self, rows: Float[Tensor, "R D"], *, groups: RowGroups) -> Float[Tensor, "R D"]:
        rows = as_autocast(rows)
        return grouped_feed_forward(
            rows,
            weights=self.weights,
            groups=groups,
            activation=self.activation,
            gemm=select_grouped_gemm(rows),
        )

    def forward_edges(self, x: Float[Tensor, "T D"], *, edges: Edges) -> Float[Tensor, "T D"]:
        x = as_autocast(x)
        mixer = select_moe_kernel(x, activation=self.activation)
        return mixer(x, edges=edges, weights=self.weights, activation=self.activation)

    def in_one_call(
        self, x: Float[Tensor, "T D"], *, function: Callable[[Tensor, Any], Tensor]
    ) -> Float[Tensor, "T D"]:
        return function(x, self)


def as_autocast(x: Tensor) -> Tensor:
    """Return rows in the dtype that autocast computes products in, if it is on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class LoRAExpert(Expert):
    """Expert e multiplies with ``W + alpha / rank * A_e B_e`` at both products (LoRA, 2106.09685).

    W is one feed-forward for all experts, trained like any other (freezing it is the optimizer's
    affair); each ``B_e`` starts as zero, so all experts start as W. Mixtures of such changes
    are MoLoRA (2309.05444), there of a frozen pretrained W and merged softly. Biases belong to W.
    """

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)

    def build(self, size: ExpertShape) -> "LoRAExperts":
        return LoRAExperts(size, rank=self.rank, scale=self.alpha / self.rank)

    def parameter_specs(
        self, size: ExpertShape, *, active_fraction: float
    ) -> Sequence[ParameterSpec]:
        experts, rank, feed = size.num_experts, self.rank, size.feed_forward
        width = feed.activation.width(feed.hidden)
        base = feed_forward_parameter_specs(feed, dim=size.dim, bias=size.bias)
        banks = ((size.dim, rank), (rank, width), (feed.hidden, rank), (rank, size.dim))
        return [
            *(
                ParameterSpec(piece.kind, piece.shape, uses_per_token=active_fraction * experts)
                for piece in base
            ),
            *(ParameterSpec("expert", (experts, *shape), active_fraction) for shape in banks),
        ]

    def saved_activations(
        self, size: ExpertShape, *, edges: float, live_fraction: float = 1.0
    ) -> float:
        del live_fraction  # rows of edges that lead nowhere are kept, too
        feed = size.feed_forward
        inner = feed.activation.saved_activations * feed.hidden + 2 * self.rank
        return edges * (2 * size.dim + inner + 4)


class LoRAExperts(ExpertModule, CustomInitializers):
    """``up_a`` [E, D, r], ``up_b`` [E, r, F], ``down_a`` [E, F, r], ``down_b`` [E, r, D]."""

    def __init__(self, size: ExpertShape, *, rank: int, scale: float) -> None:
        super().__init__()
        experts, feed = size.num_experts, size.feed_forward
        width = feed.activation.width(feed.hidden)
        self.base = DenseFeedForward(feed, dim=size.dim, bias=size.bias)
        self.up_a = nn.Parameter(torch.empty(experts, size.dim, rank))
        self.up_b = nn.Parameter(torch.empty(experts, rank, width))
        self.down_a = nn.Parameter(torch.empty(experts, feed.hidden, rank))
        self.down_b = nn.Parameter(torch.empty(experts, rank, size.dim))
        self.activation, self.scale = feed.activation, scale

    def initializers(self) -> Mapping[str, Initializer]:
        return {"up_b": Initializer(std=0.0), "down_b": Initializer(std=0.0)}

    def forward(self, rows: Float[Tensor, "R D"], *, groups: RowGroups) -> Float[Tensor, "R D"]:
        rows = as_autocast(rows)
        low = self._low_rank_product(rows, a=self.up_a, b=self.up_b, groups=groups)
        hidden = self.activation(self.base.up(rows) + low)
        low = self._low_rank_product(hidden, a=self.down_a, b=self.down_b, groups=groups)
        return zero_rows_past_groups(self.base.down(hidden) + low, offsets=groups.offsets)

    def _low_rank_product(self, rows: Tensor, *, a: Tensor, b: Tensor, groups: RowGroups) -> Tensor:
        engine = select_grouped_gemm(rows)
        low = grouped_matmul(rows, weight=a, groups=groups, gemm=engine)
        return self.scale * grouped_matmul(low, weight=b, groups=groups, gemm=engine)
