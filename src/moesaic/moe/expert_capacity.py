"""Expert capacity and drop priority: which edges are dropped when an expert is full.

The priority is decided by keys that are functions of the token. With capacity over the whole batch
the same edges are dropped for any number of ranks; keys of router weights are so up to the rounding
of the weights (see ``WeightPriority``). ``CapacityScope`` (``parallel/batch_ranks.py``) has
other scopes: the ranks that share experts, one data rank, one row.

Letters: T tokens, E experts, K experts per token, N edges, C columns of a key.
"""

from functools import partial
from typing import ClassVar

import torch
from pydantic import Field

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Int, Tensor
from moesaic.moe.batch_group import BatchGroup
from moesaic.moe.edge_queues import QueuedEdges, keep_first_of_rows
from moesaic.moe.router_context import RouterContext
from moesaic.moe.routing import Routing
from moesaic.ops.counter_rng import hash_combine


class Limit(Choice):
    """Family of capacity limits: each marks the edges over an expert's capacity as dropped.

    ``needs_whole_rows`` is that of ``Select``.
    """

    needs_whole_rows: ClassVar[bool] = False

    def __call__(
        self, routing: Routing, router: RouterContext, batch_group: BatchGroup, /
    ) -> Routing:
        """Return the routing with edges dropped. Collective over ``batch_group``."""
        raise NotImplementedError


class Dropless(Limit):
    """No limit: no edge is dropped (2211.15841)."""

    def __call__(
        self, routing: Routing, _router: RouterContext, _batch_group: BatchGroup, /
    ) -> Routing:
        return routing


class Priority(Choice):
    """Family of drop priorities. ``key_bits`` are the bits of each column of a key."""

    key_bits: ClassVar[tuple[int, ...]]

    def key(self, routing: Routing, *, router: RouterContext) -> Int[Tensor, "N C"]:
        """Return each edge's sort key: edges with smaller keys are kept first.

        A column of 64 bits is signed, another is not negative.
        """
        raise NotImplementedError

    def of(self, router: RouterContext, /) -> "Priority":
        """Return the priority that applies to this pass."""
        del router
        return self


class PositionPriority(Priority):
    """Earlier tokens first, and all first choices before any second choice (GShard, 2006.16668).

    Rows of the batch are ordered by their keys. Later tokens are dropped more often; with
    ``RandomPriority`` they are not.
    """

    key_bits: ClassVar[tuple[int, ...]] = (16, 64, 32)

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

    key_bits: ClassVar[tuple[int, ...]] = (16, 32, 64, 32)

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

    key_bits: ClassVar[tuple[int, ...]] = (32, 16, 64, 32)

    def key(self, routing: Routing, *, router: RouterContext) -> Int[Tensor, "N C"]:
        order = _descending(routing.weight.detach().float())
        return torch.cat([order[:, None], PositionPriority().key(routing, router=router)], 1)


class RandomPriority(Priority):
    """Random Token Selection (2109.10465): a drop depends on the expert's load, not on position.

    In training only. In evaluation the largest weights go first, so the same input gives the same
    output (DeepSpeed's selection is random there, too).
    """

    key_bits: ClassVar[tuple[int, ...]] = (64,)

    def of(self, router: RouterContext, /) -> Priority:
        return self if router.training else WeightPriority()

    def key(self, routing: Routing, *, router: RouterContext) -> Int[Tensor, "N C"]:
        key = router.context.random_key("room")  # of edges alone: few of all experts are chosen
        return hash_combine(key[routing.token], routing.expert)[:, None]


class Capacity(Limit):
    """At most ``max(minimum, ceil(factor * N / E))`` edges per expert; N counts real tokens only.

    N = T * K edges of the tokens in one capacity scope, by default all of the micro-batch
    (``parallel.capacity_scope``). Null experts have no
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
        edges = _queued(routing, router=router, priority=self.priority.of(router))
        capacity = partial(self.expert_capacity, num_experts=routing.num_experts, factor=factor)
        return routing.drop(~batch_group.keep_first(edges, capacity=capacity))

    def expert_capacity(
        self, edges: Int[Tensor, "Q"], *, num_experts: int, factor: float
    ) -> Int[Tensor, "Q"]:
        """Return the largest number of edges that one expert takes of so many."""
        share = (factor * edges.double() / num_experts).ceil().long()
        return share.clamp(min=self.minimum)


class RowCapacity(Limit):
    """At most ``number`` edges of each row per expert, in evaluation too: transformers' Switch.

    A token that is decoded by itself is a row, so nothing is dropped then.
    """

    needs_whole_rows: ClassVar[bool] = True
    number: int = Field(default=64, ge=1)
    priority: Priority = PositionPriority()

    def __call__(
        self, routing: Routing, router: RouterContext, _batch_group: BatchGroup, /
    ) -> Routing:
        edges = _queued(routing, router=router, priority=self.priority.of(router))
        kept = keep_first_of_rows(edges, capacity=partial(torch.full_like, fill_value=self.number))
        return routing.drop(~kept)


def _queued(routing: Routing, *, router: RouterContext, priority: Priority) -> QueuedEdges:
    return QueuedEdges(
        routing.expert,
        priority.key(routing, router=router),
        priority.key_bits,
        row=router.context.row[routing.token],
        num_experts=routing.num_experts,
        num_limited=routing.num_experts - router.num_null_experts,
    )


def _descending(values: Float[Tensor, "N"]) -> Int[Tensor, "N"]:
    """Return 31 bits that order non-negative float32 from the largest to the smallest."""
    bits = values.contiguous().view(torch.int32).long()  # in the order of the values
    return torch.iinfo(torch.int32).max - bits


def choice_ranks(routing: Routing) -> Int[Tensor, "N"]:
    """Return the rank of each edge among its token's choices, 0 for the first (or if unknown)."""
    k = routing.per_token
    edges = torch.arange(routing.expert.numel(), device=routing.expert.device)
    return edges % k if k else torch.zeros_like(edges)
