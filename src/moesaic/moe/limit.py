"""Limit: how many tokens an expert takes, and who goes first when it is full.

Letters: T tokens, E experts, K experts per token, N edges.
"""

import math

import torch
from pydantic import Field

from moesaic.core.config import Choice
from moesaic.core.shapes import Int, Tensor
from moesaic.moe.routing import Routing


class Limit(Choice):
    """Family of limits: each re-labels the edges that an expert has no room for."""

    def __call__(self, routing: Routing, *, training: bool) -> Routing:
        """Return the routing with the lost edges leading nowhere."""
        raise NotImplementedError


class Dropless(Limit):
    """Every edge is served (2211.15841)."""

    def __call__(self, routing: Routing, *, training: bool) -> Routing:
        del training
        return routing


class Priority(Choice):
    """Family of orders in which edges are given room."""

    def rank(self, routing: Routing, *, training: bool) -> Int[Tensor, "N"]:
        """Return the edges, most important first."""
        raise NotImplementedError


class ByPosition(Priority):
    """Earlier tokens first, and all first choices before any second one (GShard, 2006.16668).

    Later tokens are dropped more often: see ``AtRandom`` for the cure.
    """

    def rank(self, routing: Routing, *, training: bool) -> Int[Tensor, "N"]:
        del training
        edges = torch.arange(routing.expert.numel(), device=routing.expert.device)
        k = routing.per_token
        return edges.view(-1, k).t().flatten() if k > 1 else edges


class ByWeight(Priority):
    """Heaviest edges first: batch prioritised routing (2106.05974)."""

    def rank(self, routing: Routing, *, training: bool) -> Int[Tensor, "N"]:
        del training
        return routing.weight.argsort(descending=True, stable=True)


class AtRandom(Priority):
    """Random Token Selection (2109.10465): survival depends on congestion only, not on position.

    In training only. In evaluation edges go by weight, so the same input gives the same output
    (DeepSpeed's stays random there).
    """

    def rank(self, routing: Routing, *, training: bool) -> Int[Tensor, "N"]:
        if not training:
            return ByWeight().rank(routing, training=False)
        return torch.rand(routing.expert.shape, device=routing.expert.device).argsort()


class Capacity(Limit):
    """At most ``max(minimum, ceil(factor * N / E))`` edges per expert; N counts real tokens only.

    N = T * K edges of this rank's micro-batch. ``eval_factor`` applies outside training; None
    means dropless there, so that decoding does not depend on what else is in the batch.
    """

    factor: float = Field(default=1.25, gt=0)
    eval_factor: float | None = Field(default=None, gt=0)
    minimum: int = Field(default=4, ge=0)
    priority: Priority = AtRandom()

    def __call__(self, routing: Routing, *, training: bool) -> Routing:
        factor = self.factor if training else self.eval_factor
        if factor is None:
            return routing
        ranked = self.priority.rank(routing, training=training)
        return routing.drop(places(routing.expert, ranked=ranked) >= self.room(routing, factor))

    def room(self, routing: Routing, factor: float) -> int:
        """Edges that one expert takes."""
        fair = routing.expert.numel() / routing.num_experts
        return max(self.minimum, math.ceil(factor * fair))


def places(expert: Int[Tensor, "N"], *, ranked: Int[Tensor, "N"]) -> Int[Tensor, "N"]:
    """Each edge's place in its expert's queue, when edges arrive in the order ``ranked``."""
    by_expert = ranked[expert[ranked].argsort(stable=True)]
    queue = expert[by_expert]
    place = torch.empty_like(by_expert)
    first = torch.searchsorted(queue, queue)
    place[by_expert] = torch.arange(queue.numel(), device=queue.device) - first
    return place
