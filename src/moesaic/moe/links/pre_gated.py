"""PreGated: each MoE layer's router chooses for the one above, so experts can be fetched ahead.

Letters: T tokens, C what a gate reads, E experts.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.context import Carry
from moesaic.moe.gates import Condition, Handing, Link, Place, Scored
from moesaic.moe.pieces import Piece


class PreGated(Link):
    """Pre-gated MoE (2308.12066): layer l decides for layer l + 1, from what it reads itself.

    The first MoE layer of a stack has two gates, its own and that of the next; the last has none.
    Noise, selection, limits and balance stay where the logits are used. All MoE layers of a stack
    have the same number of experts.
    """

    def gate(self, *, dim: int, experts: int, place: Place) -> nn.Module:
        return PreGate(dim=dim, experts=experts, place=place)

    def gate_pieces(self, *, dim: int, experts: int, place: Place) -> Sequence[Piece]:
        gates = (place.index == 0) + (place.index + 1 < place.count)
        return (Piece("router", (experts, dim)),) * gates

    def hands(self, *, experts: int) -> Handing:
        return Handing(logits=experts)

    def kept(self, *, dim: int, place: Place) -> int:
        return 0 if self.gate_pieces(dim=dim, experts=1, place=place) else -dim

    def problems(self, *, experts: Sequence[int], condition: Condition) -> str | None:
        del condition
        return f"one number of experts in a stack, not {experts}" if len(set(experts)) > 1 else None


class PreGate(nn.Module):
    """``weight`` is the gate of this layer, ``ahead`` that of the next, where there are such."""

    def __init__(self, *, dim: int, experts: int, place: Place) -> None:
        super().__init__()
        first, last = place.index == 0, place.index + 1 == place.count
        self.weight = nn.Parameter(torch.empty(experts, dim)) if first else None
        self.ahead = None if last else nn.Parameter(torch.empty(experts, dim))

    def forward(self, x: Float[Tensor, "T C"], *, carry: Carry) -> Scored:
        logits = carry.logits if self.weight is None else x @ self.weight.float().t()
        if logits is None:
            raise TypeError("a pre-gated layer needs the logits that the layer below made for it")
        ahead = None if self.ahead is None else x @ self.ahead.float().t()
        return Scored(logits, replace(carry, logits=ahead))
