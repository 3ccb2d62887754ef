"""Experts: one feed-forward each, held as banks of matrices and applied to rows sorted by expert.

Letters: E experts, R rows, D model dim, F hidden width (2F before a gated activation).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor
from moesaic.moe.pieces import ParameterSpec
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.ops.choose import select_grouped_gemm, select_moe_kernel
from moesaic.ops.group import RowGroups
from moesaic.ops.grouped import ActivationFunction, FeedForwardWeights, grouped_feed_forward
from moesaic.ops.mixture import Edges, unpermute_tokens, permute_tokens


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

    def parameter_specs(self, size: ExpertShape, *, active_fraction: float) -> Sequence[ParameterSpec]:
        """Return their parameters; a token uses the share ``used`` of the banks."""
        raise NotImplementedError

    def saved_activations(self, size: ExpertShape, *, edges: float, live_fraction: float = 1.0) -> float:
        """Return the values that autograd keeps per token of so many edges (for forecasts).

        Rows and answers of the edges are among them, the token's own state is not. ``live`` is the
        share of edges that lead somewhere.
        """
        raise NotImplementedError


class ExpertModule(nn.Module):
    """Base of modules that hold the experts of a layer (see ``dispatch.RowExperts``)."""

    def forward(self, rows: Float[Tensor, "R D"], *, groups: RowGroups) -> Float[Tensor, "R D"]:
        """Apply each row's expert; rows past the groups come out as zero."""
        raise NotImplementedError

    def forward_edges(self, x: Float[Tensor, "T D"], *, edges: Edges) -> Float[Tensor, "T D"]:
        """Return each token's weighted sum of its experts' answers.

        By definition: ``carry_home(self(carry_out(x)))``; a bank that can do it in one go does.
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

    def parameter_specs(self, size: ExpertShape, *, active_fraction: float) -> Sequence[ParameterSpec]:
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

    def saved_activations(self, size: ExpertShape, *, edges: float, live_fraction: float = 1.0) -> float:
        feed = size.feed_forward
        mixer = select_moe_kernel(torch.empty(0), activation=feed.activation)  # the one of this machine
        width = feed.activation.width(feed.hidden)
        return edges * mixer.saved_activations(dim=size.dim, width=width, bias=size.bias, live_share=live_fraction)


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
