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
from moesaic.moe.pieces import Piece
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.ops.choose import pick_engine, pick_mixer
from moesaic.ops.group import Groups
from moesaic.ops.grouped import Activation, Banks, grouped_feed_forward
from moesaic.ops.mixture import Edges, carry_home, carry_out


@dataclass(frozen=True, slots=True)
class Size:
    """How many experts of which feed-forward, and the dim of the rows they read and write."""

    num_experts: int
    dim: int
    feed_forward: FeedForwardConfig
    bias: bool


class Expert(Choice):
    """Family: what an expert is. A member builds all experts of a layer at once."""

    def build(self, size: Size) -> "ExpertBank":
        """Return the experts of a layer."""
        raise NotImplementedError

    def pieces(self, size: Size, *, used: float) -> Sequence[Piece]:
        """Return their parameters; a token uses the share ``used`` of the banks."""
        raise NotImplementedError

    def kept(self, size: Size, *, edges: float, live: float = 1.0) -> float:
        """Return the values that autograd keeps per token of so many edges (for forecasts).

        Rows and answers of the edges are among them, the token's own state is not. ``live`` is the
        share of edges that lead somewhere.
        """
        raise NotImplementedError


class ExpertBank(nn.Module):
    """Base of modules that hold the experts of a layer (see ``dispatch.RowExperts``)."""

    def forward(self, rows: Float[Tensor, "R D"], *, groups: Groups) -> Float[Tensor, "R D"]:
        """Apply each row's expert; rows past the groups come out as zero."""
        raise NotImplementedError

    def mix(self, x: Float[Tensor, "T D"], *, edges: Edges) -> Float[Tensor, "T D"]:
        """Return each token's weighted sum of its experts' answers.

        By definition: ``carry_home(self(carry_out(x)))``; a bank that can do it in one go does.
        """
        rows = carry_out(x, edges=edges)
        return carry_home(self.forward(rows, groups=edges.groups), edges=edges)

    def within(
        self, x: Float[Tensor, "T D"], *, work: Callable[[Tensor, Any], Tensor]
    ) -> Float[Tensor, "T D"]:
        """Return ``work(x, experts)`` for experts whose calls run no hooks of this module."""
        return work(x, _Unwatched(self))


class _Unwatched:
    """A bank as its class defines it, whatever was hung on the instance."""

    def __init__(self, bank: ExpertBank) -> None:
        self._bank = bank

    def __call__(self, rows: Float[Tensor, "R D"], *, groups: Groups) -> Float[Tensor, "R D"]:
        return type(self._bank).forward(self._bank, rows, groups=groups)

    def mix(self, x: Float[Tensor, "T D"], *, edges: Edges) -> Float[Tensor, "T D"]:
        return type(self._bank).mix(self._bank, x, edges=edges)

    def within(
        self, x: Float[Tensor, "T D"], *, work: Callable[[Tensor, Any], Tensor]
    ) -> Float[Tensor, "T D"]:
        return work(x, self)


class FeedForwardExpert(Expert):
    """Two products with an activation between, a pair of matrices per expert."""

    def build(self, size: Size) -> "Experts":
        return Experts(size)

    def pieces(self, size: Size, *, used: float) -> Sequence[Piece]:
        experts, feed = size.num_experts, size.feed_forward
        width = feed.activation.width(feed.hidden)
        banks = [
            Piece("expert", (experts, size.dim, width), used),
            Piece("expert", (experts, feed.hidden, size.dim), used),
        ]
        if size.bias:
            banks.append(Piece("bias", (experts, width), used))
            banks.append(Piece("bias", (experts, size.dim), used))
        return banks

    def kept(self, size: Size, *, edges: float, live: float = 1.0) -> float:
        feed = size.feed_forward
        mixer = pick_mixer(torch.empty(0), activation=feed.activation)  # the one of this machine
        width = feed.activation.width(feed.hidden)
        return edges * mixer.kept(dim=size.dim, width=width, bias=size.bias, live=live)


class Experts(ExpertBank):
    """``up`` [E, D, F] and ``down`` [E, F, D]: rows are multiplied from the left."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        experts, feed = size.num_experts, size.feed_forward
        width = feed.activation.width(feed.hidden)
        self.up = nn.Parameter(torch.empty(experts, size.dim, width))
        self.down = nn.Parameter(torch.empty(experts, feed.hidden, size.dim))
        if size.bias:
            self.up_bias = nn.Parameter(torch.zeros(experts, width))
            self.down_bias = nn.Parameter(torch.zeros(experts, size.dim))
        self.activation, self.bias = feed.activation, size.bias

    def forward(self, rows: Float[Tensor, "R D"], *, groups: Groups) -> Float[Tensor, "R D"]:
        return Bare(self.banks, self.activation)(rows, groups=groups)

    def mix(self, x: Float[Tensor, "T D"], *, edges: Edges) -> Float[Tensor, "T D"]:
        return Bare(self.banks, self.activation).mix(x, edges=edges)

    @property
    def banks(self) -> Banks:
        biases = (self.up_bias, self.down_bias) if self.bias else (None, None)
        return Banks(self.up, self.down, *biases)


@dataclass(frozen=True, slots=True)
class Bare:
    """What a bank of feed-forwards computes, for matrices that need not be its own."""

    banks: Banks
    activation: Activation

    def __call__(self, rows: Float[Tensor, "R D"], *, groups: Groups) -> Float[Tensor, "R D"]:
        rows = as_autocast(rows)
        return grouped_feed_forward(
            rows,
            banks=self.banks,
            groups=groups,
            activation=self.activation,
            engine=pick_engine(rows),
        )

    def mix(self, x: Float[Tensor, "T D"], *, edges: Edges) -> Float[Tensor, "T D"]:
        x = as_autocast(x)
        mixer = pick_mixer(x, activation=self.activation)
        return mixer(x, edges=edges, banks=self.banks, activation=self.activation)

    def within(
        self, x: Float[Tensor, "T D"], *, work: Callable[[Tensor, Any], Tensor]
    ) -> Float[Tensor, "T D"]:
        return work(x, self)


def as_autocast(x: Tensor) -> Tensor:
    """Return rows in the dtype that autocast computes products in, if it is on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
