"""Select: from router logits to edges.

Letters: T tokens, E experts, K experts per token, N edges.

Among: which of the experts a token may choose from.

Letters: T tokens, E experts, G groups.

SigmoidTopK: experts scored one by one, without a softmax over all of them.

Letters: T tokens, E experts, K experts per token.

NullTopK: choices that may be spent on experts that do nothing.

Letters: T tokens, E experts (null ones included), K choices per token.

Hash: an expert by the token's id alone.

Letters: T tokens, E experts.
"""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor
from moesaic.moe.router_context import RouterContext, StatefulRule
from moesaic.moe.routing import Routing
from moesaic.ops.counter_rng import hash_combine, hash_name


class ExpertGroups(Choice):
    """Family: what narrows a token's choice before it is made."""

    def __call__(self, scores: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Return the scores to choose by, minus infinity where there is no choice."""
        raise NotImplementedError

    def problems(self, *, experts: int, k: int) -> str | None:
        """Return what it expects instead of so many experts, of which k are chosen, or None."""
        del experts, k
        return None


class AllExperts(ExpertGroups):
    """Any expert."""

    def __call__(self, scores: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        return scores


class TopGroups(ExpertGroups):
    """Experts of the ``kept`` best of ``groups`` equal groups of neighbours.

    A group's score is the sum of its ``best`` highest: 2 in DeepSeek-V3 (2412.19437, section 2.1.2,
    where a group is a node), 1 in DeepSeek-V2 (2405.04434, section 2.2.2, where it is a device).
    So a token's rows travel to few places.
    """

    num_groups: int = Field(ge=1)
    top_groups: int = Field(ge=1)
    experts_per_score: int = Field(default=2, ge=1)

    @model_validator(mode="after")
    def _check(self) -> "TopGroups":
        if self.top_groups > self.num_groups:
            raise ValueError(f"kept of at most groups={self.num_groups}, not {self.top_groups}")
        return self

    def __call__(self, scores: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        each = scores.unflatten(-1, (self.num_groups, -1))
        good = each.topk(min(self.experts_per_score, each.shape[-1]), dim=-1).values.sum(-1)
        lost = good.new_ones(good.shape).scatter(-1, good.topk(self.top_groups, dim=-1).indices, 0)
        return each.masked_fill(lost.bool()[..., None], float("-inf")).flatten(-2)

    def problems(self, *, experts: int, k: int) -> str | None:
        if experts % self.num_groups:
            return f"a number of experts that groups={self.num_groups} divides, not {experts}"
        room = experts // self.num_groups * self.top_groups
        return None if k <= room else f"k of at most {room}, all in the groups kept, not {k}"


class Select(Choice, StatefulRule):
    """Family of selection rules; what they see is a ``RouterContext``.

    ``causal`` is false of a rule whose answer for a token depends on later tokens: a decoder, which
    does not have them yet when it writes, refuses it. ``needs_whole_rows`` is true of one that compares the
    tokens of a row: ranks that hold slices of rows refuse it.
    """

    causal: ClassVar[bool] = True
    needs_whole_rows: ClassVar[bool] = False

    def __call__(self, router: RouterContext) -> Routing:
        """Return the edges, weights float32 and in the graph."""
        raise NotImplementedError

    def probabilities(self, router: RouterContext) -> Float[Tensor, "T E"]:
        """Return what balance terms take as each token's probabilities: they sum to one."""
        return router.logits.softmax(-1)

    def renormalise(self, routing: Routing) -> Routing:
        """Adjust weights once a limit has dropped edges; most rules leave them."""
        return routing

    def experts_per_token(self, num_experts: int) -> float:
        """Edges per token, on average: what FLOPs are counted with."""
        raise NotImplementedError

    def problems(self, *, experts: int, num_null_experts: int) -> str | None:
        """Return what it expects instead of so many experts (spare ones included), or None."""
        del num_null_experts
        k = self.experts_per_token(2**30)
        return None if k <= experts else f"at least {k:g} experts, not {experts}"


class TopK(Select):
    """Each token's k likeliest experts (1701.06538).

    ``normalise`` says when weights are made to sum to one over the chosen: ``before`` a limit drops
    edges (Mixtral; a dropped edge takes its share with it), ``after`` (DeepSpeed: survivors share
    everything), or ``none`` (DeepSeekMoE, 2401.06066: plain softmax probabilities). ``among``
    narrows the choice; groups are judged by their logits.
    """

    k: int = Field(default=2, ge=1)
    normalise: Literal["before", "after", "none"] = "before"
    expert_groups: ExpertGroups = AllExperts()

    def __call__(self, router: RouterContext) -> Routing:
        logits = router.logits
        expert = self.expert_groups(router.biased_scores(logits)).topk(self.k, dim=-1).indices
        if self.normalise == "before":
            # equals softmax over all, then divided by the chosen sum
            weight = logits.gather(-1, expert).softmax(-1)
        else:
            weight = logits.softmax(-1).gather(-1, expert)
        return Routing.from_topk(weight, expert=expert, num_experts=logits.shape[-1])

    def renormalise(self, routing: Routing) -> Routing:
        if self.normalise != "after":
            return routing
        weight = routing.weight.view(-1, self.k)
        total = weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
        return replace(routing, weight=(weight / total).flatten())

    def experts_per_token(self, num_experts: int) -> float:
        return float(min(self.k, num_experts))

    def problems(self, *, experts: int, num_null_experts: int) -> str | None:
        few = super().problems(experts=experts, num_null_experts=num_null_experts)
        return few or self.expert_groups.problems(experts=experts, k=self.k)


class SwitchTop1(Select):
    """The likeliest expert, weighted by its softmax probability (2101.03961, equations 1 and 2)."""

    def __call__(self, router: RouterContext) -> Routing:
        expert = router.biased_scores(router.logits).argmax(-1, keepdim=True)
        weight = router.logits.softmax(-1).gather(-1, expert)
        return Routing.from_topk(weight, expert=expert, num_experts=router.logits.shape[-1])

    def experts_per_token(self, num_experts: int) -> float:
        return float(min(1, num_experts))


class Top2(Select):
    """GShard's two experts (2006.16668, section 2.2), weights normalised over the two.

    ``second``: ``highest``, or in training ``sampled`` from the softmax over the others (Gumbel-max
    as in DeepSpeed, but in evaluation always the highest, which DeepSpeed's is not).
    """

    second: Literal["highest", "sampled"] = "highest"

    def __call__(self, router: RouterContext) -> Routing:
        logits, rest = router.logits, router.biased_scores(router.logits)
        first = rest.argmax(-1, keepdim=True)
        if router.training and self.second == "sampled":
            draw = router.context.uniform("second choice", width=rest.shape[-1])
            rest = rest - (-draw.clamp(min=1e-12).log()).log()
        second = rest.scatter(-1, first, float("-inf")).argmax(-1, keepdim=True)
        expert = torch.cat([first, second], -1)
        weight = logits.gather(-1, expert).softmax(-1)
        return Routing.from_topk(weight, expert=expert, num_experts=logits.shape[-1])

    def experts_per_token(self, num_experts: int) -> float:
        return float(min(2, num_experts))


class SigmoidTopK(Select):
    """The k highest sigmoid scores (DeepSeek-V3, 2412.19437, equations 12 to 16).

    A balance rule's bias is added to the scores when experts are chosen and when groups are judged
    (``among``), never to weights. Weights are the chosen scores divided by their sum, times
    ``scale``: computed as a softmax of logarithms, so scores that all vanish share one weight
    evenly, where a sum with 1e-20 added would leave them none. ``probabilities`` are the scores of
    all experts, made to sum to one in the same way.
    """

    k: int = Field(default=2, ge=1)
    scale: float = Field(default=1.0, gt=0)
    expert_groups: ExpertGroups = AllExperts()

    def __call__(self, router: RouterContext) -> Routing:
        scores = self.expert_groups(router.biased_scores(router.logits.sigmoid()))
        expert = scores.topk(self.k, dim=-1).indices
        weight = normalised_sigmoid(router.logits.gather(-1, expert)) * self.scale
        return Routing.from_topk(weight, expert=expert, num_experts=router.logits.shape[-1])

    def probabilities(self, router: RouterContext) -> Float[Tensor, "T E"]:
        return normalised_sigmoid(router.logits)

    def experts_per_token(self, num_experts: int) -> float:
        return float(min(self.k, num_experts))

    def problems(self, *, experts: int, num_null_experts: int) -> str | None:
        few = super().problems(experts=experts, num_null_experts=num_null_experts)
        return few or self.expert_groups.problems(experts=experts, k=self.k)


def normalised_sigmoid(logits: Float[Tensor, "T K"]) -> Float[Tensor, "T K"]:
    """Return ``sigmoid(logits)`` divided by its sum over each row, whatever the logits."""
    return F.logsigmoid(logits).softmax(-1)


class NullTopK(Select):
    """The k likeliest of true and null experts (AdaMoE, 2406.13233).

    For a mixture with ``spare=ZeroExperts(m)``. Weights are normalised over the true experts among
    the k; edges to null experts are kept, for balance and statistics, and weigh nothing. A token
    whose choices are all null gets nothing from its experts.
    """

    k: int = Field(default=3, ge=1)

    def __call__(self, router: RouterContext) -> Routing:
        logits = router.logits
        experts = logits.shape[-1]
        expert = router.biased_scores(logits).topk(self.k, dim=-1).indices
        null = expert >= experts - router.num_null_experts
        # finite, so that a row of nulls alone is no 0 / 0
        true = logits.gather(-1, expert).masked_fill(null, torch.finfo(logits.dtype).min)
        weight = torch.where(null, 0.0, true.softmax(-1))
        return Routing.from_topk(weight, expert=expert, num_experts=experts)

    def experts_per_token(self, num_experts: int) -> float:
        return float(min(self.k, num_experts))

    def problems(self, *, experts: int, num_null_experts: int) -> str | None:
        if not num_null_experts:
            return "null experts beside the true ones (moe.null_experts=ZeroExperts(number=8))"
        return super().problems(experts=experts, num_null_experts=num_null_experts)


class Hash(Select):
    """The expert that a token's vocabulary id hashes to, with weight one (2106.04426).

    The hash is another in every layer and the same in every run. Nothing is learnt: use it with
    ``balance=()``, and compare learnt rules with it. The gate is there and counted, but not asked.
    The paper's balanced assignment, which knows how frequent each id is, is not here.
    """

    def __call__(self, router: RouterContext) -> Routing:
        tokens, experts = router.logits.shape
        key = hash_combine(router.context.token, router.context.salt ^ hash_name("hash"))
        expert = (key % experts)[:, None]
        weight = router.logits.new_ones(tokens, 1)
        return Routing.from_topk(weight, expert=expert, num_experts=experts)

    def experts_per_token(self, num_experts: int) -> float:
        return float(min(1, num_experts))
