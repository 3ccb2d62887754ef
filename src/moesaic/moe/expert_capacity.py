"""Expert capacity and drop priority: which edges are dropped when an expert is full.

The priority is decided over the whole batch by keys that are functions of the token, so the same
edges are dropped for any number of ranks; keys of router weights are so up to the rounding of the
weights (see ``WeightPriority``).

Letters: T tokens, E experts, K experts per token, N edges, C columns of a key.
"""

import math
from typing import ClassVar

import torch
from pydantic import Field

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Int, Tensor
from moesaic.moe.batch_group import BatchGroup
from moesaic.moe.router_context import RouterContext
from moesaic.moe.routing import Routing


class Limit(Choice):
    """Family of capacity limits: each marks the edges over an expert's capacity as dropped."""

    def __call__(
        self, routing: Routing, router: RouterContext, batch_group: BatchGroup, /
    ) -> Routing:
        """Return the routing with edges dropped. Collective over ``batch_group``."""
        raise NotImplementedError

    def num_gathered_integers(self, _edges: int, /) -> int:
        """Return how many integers a rank with so many edges gathers (for forecasts)."""
        return 0


class Dropless(Limit):
    """No limit: no edge is dropped (2211.15841)."""

    def __call__(
        self, routing: Routing, _router: RouterContext, _batch_group: BatchGroup, /
    ) -> Routing:
        return routing


class Priority(Choice):
    """Family of drop priorities. ``num_key_columns`` is C in training."""

    num_key_columns: ClassVar[int]

    def key(self, routing: Routing, *, router: RouterContext) -> Int[Tensor, "N C"]:
        """Return each edge's sort key: edges with smaller keys are kept first."""
        raise NotImplementedError


class PositionPriority(Priority):
    """Earlier tokens first, and all first choices before any second choice (GShard, 2006.16668).

    Rows of the batch are ordered by their keys. Later tokens are dropped more often; with
    ``RandomPriority`` they are not.
    """

    num_key_columns: ClassVar[int] = 3

    def key(self, routing: Routing, *, router: RouterContext) -> Int[Tensor, "N C"]:
        context, token = router.context, routing.token
        choice = choice_ranks(routing)
        return torch.stack([choice, context.row_key[token], context.position[token]], 1)


class BatchPriority(Priority):
    """Batch prioritised routing (2106.05974): tokens by their greatest probability.

    All first choices go before any second choice; among them, tokens whose largest softmax
    probability over all experts is greater go first. Ties go by position. Rounding matters as in
    ``WeightPriority``.
    """

    num_key_columns: ClassVar[int] = 4

    def key(self, routing: Routing, *, router: RouterContext) -> Int[Tensor, "N C"]:
        greatest = router.logits.detach().float().softmax(-1).amax(-1)
        key = PositionPriority().key(routing, router=router)
        order = _descending(greatest)[routing.token]
        return torch.cat([key[:, :1], order[:, None], key[:, 1:]], 1)


class WeightPriority(Priority):
    """Edges of the largest weights first, whichever choice they are. Ties go by position.

    Batch prioritised routing, which orders tokens within each choice, is ``BatchPriority``. Where
    weights are equal but for rounding, another number of ranks may drop other edges: a matrix
    product of one token rounds otherwise than one of many. With ``TagOnly`` all tokens of a row
    have equal weights, so a priority by position or at random fits it better.
    """

    num_key_columns: ClassVar[int] = 4

    def key(self, routing: Routing, *, router: RouterContext) -> Int[Tensor, "N C"]:
        order = _descending(routing.weight.detach().float())
        return torch.cat([order[:, None], PositionPriority().key(routing, router=router)], 1)


class RandomPriority(Priority):
    """Random Token Selection (2109.10465): a drop depends on the expert's load, not on position.

    In training only. In evaluation the largest weights go first, so the same input gives the same
    output (DeepSpeed's selection is random there, too).
    """

    num_key_columns: ClassVar[int] = 1

    def key(self, routing: Routing, *, router: RouterContext) -> Int[Tensor, "N C"]:
        if not router.training:
            return WeightPriority().key(routing, router=router)
        draws = router.context.random_bits("room", width=routing.num_experts + 1)
        return draws[routing.token, routing.expert][:, None]


class Capacity(Limit):
    """At most ``max(minimum, ceil(factor * N / E))`` edges per expert; N counts real tokens only.

    N = T * K edges of the micro-batch, over all ranks of its batch group. Null experts have no
    limit. ``eval_factor`` applies outside training; None means dropless there, so that decoding
    does not depend on the rest of the batch.
    """

    factor: float = Field(default=1.25, gt=0)
    eval_factor: float | None = Field(default=None, gt=0)
    minimum: int = Field(default=4, ge=0)
    priority: Priority = RandomPriority()

    def __call__(
        self, routing: Routing, router: RouterContext, batch_group: BatchGroup, /
    ) -> Routing:
        factor = self.factor if router.training else self.eval_factor
        if factor is None:
            return routing
        key = self.priority.key(routing, router=router)
        edges = batch_group.gather(torch.cat([routing.expert[:, None], key], 1))
        position = queue_positions(edges.rows)[edges.start : edges.start + key.shape[0]]
        capacity = self.expert_capacity(
            edges.rows.shape[0], num_experts=routing.num_experts, factor=factor
        )
        limited = routing.expert < routing.num_experts - router.num_null_experts
        return routing.drop((position >= capacity) & limited)

    def num_gathered_integers(self, edges: int, /) -> int:
        return 1 + edges * (1 + self.priority.num_key_columns)

    def expert_capacity(self, edges: int, *, num_experts: int, factor: float) -> int:
        """Return the largest number of edges that one expert takes of so many."""
        return max(self.minimum, math.ceil(factor * edges / num_experts))


def _descending(values: Float[Tensor, "N"]) -> Int[Tensor, "N"]:
    """Return integers that order non-negative float32 from the largest to the smallest."""
    return -values.contiguous().view(torch.int32).long()  # bits are in the order of the values


def choice_ranks(routing: Routing) -> Int[Tensor, "N"]:
    """Return the rank of each edge among its token's choices, 0 for the first (or if unknown)."""
    k = routing.per_token
    edges = torch.arange(routing.expert.numel(), device=routing.expert.device)
    return edges % k if k else torch.zeros_like(edges)


def queue_positions(edges: Int[Tensor, "N C"]) -> Int[Tensor, "N"]:
    """Return each edge's position in its expert's queue; columns are the expert, then the key."""
    order = torch.arange(edges.shape[0], device=edges.device)
    for column in reversed(range(edges.shape[1])):
        order = order[edges[order, column].argsort(stable=True)]
    queue = edges[order, 0]
    position = torch.empty_like(order)
    first = torch.searchsorted(queue, queue)
    position[order] = torch.arange(queue.numel(), device=queue.device) - first
    return position
