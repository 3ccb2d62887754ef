"""Spare: experts that do no work, beside those that do; a token may spend its choices on them.

They are the last of a router's experts: edges to them are routed, counted and balanced like any
other, and never leave the rank.

Letters: T tokens, D model dim, E experts, N edges.
"""

from dataclasses import replace

import torch
from pydantic import Field

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor
from moesaic.moe.routing import Routing


class NullExperts(Choice):
    """Family of spare experts. ``number`` is how many there are."""

    def count(self) -> int:
        """Return the number of experts beyond those that work."""
        raise NotImplementedError

    def add_output(
        self, out: Float[Tensor, "T D"], *, x: Float[Tensor, "T D"], routing: Routing
    ) -> Float[Tensor, "T D"]:
        """Return the working experts' answer with that of the spare ones added."""
        del x, routing
        return out


class NoNullExperts(NullExperts):
    """Every expert works."""

    def count(self) -> int:
        return 0


class ZeroExperts(NullExperts):
    """``number`` null experts that answer zero (AdaMoE, 2406.13233): choices that cost nothing."""

    number: int = Field(default=1, ge=1)

    def count(self) -> int:
        return self.number


class IdentityExperts(NullExperts):
    """``number`` experts that answer with the token itself, times the edge's weight."""

    number: int = Field(default=1, ge=1)

    def count(self) -> int:
        return self.number

    def add_output(
        self, out: Float[Tensor, "T D"], *, x: Float[Tensor, "T D"], routing: Routing
    ) -> Float[Tensor, "T D"]:
        working = routing.num_experts - self.number
        idle = (routing.expert >= working) & (routing.expert < routing.num_experts)
        weight = torch.where(idle, routing.weight, 0.0)
        share = weight.new_zeros(routing.num_tokens).index_add(0, routing.token, weight)
        return out + (x.float() * share[:, None]).to(out.dtype)


def drop_null_edges(routing: Routing, *, num_null_experts: int) -> Routing:
    """Return the edges that a dispatcher carries: those to spare experts lead nowhere."""
    if not num_null_experts:
        return routing
    experts = routing.num_experts - num_null_experts
    idle = routing.expert >= experts
    return replace(
        routing,
        expert=torch.where(idle, experts, routing.expert),
        weight=torch.where(idle, 0.0, routing.weight),
        num_experts=experts,
    )
