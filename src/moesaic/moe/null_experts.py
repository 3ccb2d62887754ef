"""Null experts: zero-computation experts that a token may select in place of true experts.

They are the last of a router's outputs. Edges to them are selected, counted and balanced like any
other, and are never dispatched.

Letters: T tokens, D model dim, N edges.
"""

from dataclasses import replace

import torch
from pydantic import Field

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor
from moesaic.moe.routing import Routing


class NullExperts(Choice):
    """Family of null experts. ``count`` is how many there are."""

    def count(self) -> int:
        """Return the number of null experts."""
        raise NotImplementedError

    def add_output(
        self, out: Float[Tensor, "T D"], _x: Float[Tensor, "T D"], _routing: Routing, /
    ) -> Float[Tensor, "T D"]:
        """Return the output of the true experts plus that of the null experts."""
        return out


class NoNullExperts(NullExperts):
    """True experts only."""

    def count(self) -> int:
        return 0


class ZeroExperts(NullExperts):
    """``number`` experts with output zero (AdaMoE, 2406.13233): they cost nothing."""

    number: int = Field(default=1, ge=1)

    def count(self) -> int:
        return self.number


class IdentityExperts(NullExperts):
    """``number`` experts whose output is the token itself, times the edge's weight."""

    number: int = Field(default=1, ge=1)

    def count(self) -> int:
        return self.number

    def add_output(
        self, out: Float[Tensor, "T D"], x: Float[Tensor, "T D"], routing: Routing, /
    ) -> Float[Tensor, "T D"]:
        true = routing.num_experts - self.number
        null = (routing.expert >= true) & (routing.expert < routing.num_experts)
        weight = torch.where(null, routing.weight, 0.0)
        share = weight.new_zeros(routing.num_tokens).index_add(0, routing.token, weight)
        return out + (x.float() * share[:, None]).to(out.dtype)


def drop_null_edges(routing: Routing, *, num_null_experts: int) -> Routing:
    """Return the routing over the true experts; edges to null experts are marked as dropped."""
    if not num_null_experts:
        return routing
    experts = routing.num_experts - num_null_experts
    null = routing.expert >= experts
    return replace(
        routing,
        expert=torch.where(null, experts, routing.expert),
        weight=torch.where(null, 0.0, routing.weight),
        num_experts=experts,
    )
