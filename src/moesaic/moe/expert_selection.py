"""Top-k routers: rules that select a fixed number of experts per token (softmax, sigmoid, hash).

Rules with a variable number are in ``expert_selection_dynamic.py``.

Letters: T tokens, E experts (null experts included), K experts per token, G groups.
"""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Int, Tensor
from moesaic.moe.router_context import RouterContext, StatefulRule
from moesaic.moe.routing import Routing
from moesaic.ops.counter_rng import hash_combine, hash_name


class ExpertGroups(Choice):
    """Family: group-limited routing, which restricts the experts that a token may select."""

    def __call__(self, scores: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Return the scores, minus infinity for experts that may not be selected."""
        raise NotImplementedError

    def problems(self, _experts: int, _k: int, /) -> str | None:
        """Return what it expects instead of so many experts, k of them selected, or None."""
        return None


class AllExperts(ExpertGroups):
    """No restriction."""

    def __call__(self, scores: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        return scores


class TopGroups(ExpertGroups):
    """The experts of the ``top_groups`` best of ``num_groups`` equal groups of adjacent experts.

    The score of a group is the sum of its ``experts_per_score`` highest scores: 2 in DeepSeek-V3
    (2412.19437, section 2.1.2, where a group is a node), 1 in DeepSeek-V2 (2405.04434, section
    2.2.2, where it is a device). This bounds the number of ranks that a token is sent to.
    """

    num_groups: int = Field(ge=1)
    top_groups: int = Field(ge=1)
    experts_per_score: int = Field(default=2, ge=1)

    @model_validator(mode="after")
    def _check(self) -> "TopGroups":
        if self.top_groups > self.num_groups:
            raise ValueError(
                f"top_groups of at most num_groups={self.num_groups}, not {self.top_groups}"
            )
        return self

    def __call__(self, scores: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        grouped = scores.unflatten(-1, (self.num_groups, -1))
        best = grouped.topk(min(self.experts_per_score, grouped.shape[-1]), dim=-1).values.sum(-1)
        masked = best.new_ones(best.shape).scatter(
            -1, best.topk(self.top_groups, dim=-1).indices, 0
        )
        return grouped.masked_fill(masked.bool()[..., None], float("-inf")).flatten(-2)

    def problems(self, experts: int, k: int, /) -> str | None:
        if experts % self.num_groups:
            return f"a number of experts that num_groups={self.num_groups} divides, not {experts}"
        most = experts // self.num_groups * self.top_groups
        return None if k <= most else f"k of at most {most}, all in the top groups, not {k}"


class Select(Choice, StatefulRule):
    """Family of selection rules: map a ``RouterContext`` to token-expert edges.

    ``causal`` is false if the result for a token depends on later tokens; a decoder refuses such a
    rule. ``needs_whole_rows`` is true if the rule compares the tokens of a row; context parallelism
    refuses it. ``variable_k`` is true if the number of experts per token varies, ``balances_load``
    if the load of the experts does not depend on what the router learns.
    """

    causal: ClassVar[bool] = True
    needs_whole_rows: ClassVar[bool] = False
    variable_k: ClassVar[bool] = False
    balances_load: ClassVar[bool] = False

    def __call__(self, router: RouterContext) -> Routing:
        """Return the edges; weights are float32 and in the autograd graph."""
        raise NotImplementedError

    def probabilities(self, router: RouterContext) -> Float[Tensor, "T E"]:
        """Return the probabilities for balance losses; those of a token sum to one."""
        return router.logits.softmax(-1)

    def renormalise(self, routing: Routing) -> Routing:
        """Adjust the weights after the capacity limit; most rules keep them."""
        return routing

    def experts_per_token(self, num_experts: int) -> float:
        """Return the mean number of edges per token, from which FLOPs are counted."""
        raise NotImplementedError

    def problems(self, experts: int, _num_null_experts: int, /) -> str | None:
        """Return what it expects instead of so many experts (null ones included), or None."""
        k = 0 if self.variable_k else self.experts_per_token(2**30)
        return None if k <= experts else f"at least {k:g} experts, not {experts}"


class TopK(Select):
    """Top-k routing: each token's k experts of highest logits (1701.06538).

    ``normalise`` says when the weights of the selected experts are normalised to sum to one:
    ``before`` the capacity limit drops edges (Mixtral; the weight of a dropped edge is lost),
    ``after`` it (DeepSpeed: the remaining edges sum to one), or ``none`` (DeepSeekMoE, 2401.06066:
    plain softmax probabilities). ``scale`` multiplies them (DeepSeek-V2). A balance rule's bias is
    added to ``scores``: logits, or probabilities (ERNIE 4.5), by which
    ``expert_groups`` restricts the selection too.
    """

    k: int = Field(default=2, ge=1)
    normalise: Literal["before", "after", "none"] = "before"
    scale: float = Field(default=1.0, gt=0)
    scores: Literal["logits", "probabilities"] = "logits"
    expert_groups: ExpertGroups = AllExperts()

    def __call__(self, router: RouterContext) -> Routing:
        logits = router.logits
        scores = logits if self.scores == "logits" else logits.softmax(-1)
        expert = self.expert_groups(router.biased_scores(scores)).topk(self.k, dim=-1).indices
        weight = _choice_weights(logits, expert, normalised=self.normalise == "before")
        weight = weight if self.scale == 1 else weight * self.scale
        return Routing.from_topk(weight, expert=expert, num_experts=logits.shape[-1])

    def renormalise(self, routing: Routing) -> Routing:
        if self.normalise != "after":
            return routing
        return _kept_sum_to(self.scale, routing, k=self.k)

    def experts_per_token(self, num_experts: int) -> float:
        return float(min(self.k, num_experts))

    def problems(self, experts: int, num_null_experts: int, /) -> str | None:
        few = super().problems(experts, num_null_experts)
        return few or self.expert_groups.problems(experts, self.k)


class SwitchTop1(Select):
    """Top-1 routing, weighted by the softmax probability (2101.03961, equations 1 and 2)."""

    def __call__(self, router: RouterContext) -> Routing:
        expert = router.biased_scores(router.logits).argmax(-1, keepdim=True)
        weight = router.logits.softmax(-1).gather(-1, expert)
        return Routing.from_topk(weight, expert=expert, num_experts=router.logits.shape[-1])

    def experts_per_token(self, num_experts: int) -> float:
        return float(min(1, num_experts))


class Top2(Select):
    """GShard's two experts (2006.16668, section 2.2), weights normalised over the two.

    ``second``: ``highest``; or in training ``sampled`` from the softmax over the others (Gumbel-max
    as in DeepSpeed), or ``random``: the highest is kept with probability 2 w, w being its weight
    (GShard, algorithm 1). In evaluation it is always the highest, which DeepSpeed's and GShard's is
    not. ``normalise`` and ``scale`` are those of ``TopK``.
    """

    second: Literal["highest", "sampled", "random"] = "highest"
    normalise: Literal["before", "after"] = "before"
    scale: float = Field(default=1.0, gt=0)

    def __call__(self, router: RouterContext) -> Routing:
        logits, rest = router.logits, router.biased_scores(router.logits)
        first = rest.argmax(-1, keepdim=True)
        if router.training and self.second == "sampled":
            draw = router.context.uniform("second choice", width=rest.shape[-1])
            rest = rest - (-draw.clamp(min=1e-12).log()).log()
        second = rest.scatter(-1, first, float("-inf")).argmax(-1, keepdim=True)
        expert = torch.cat([first, second], -1)
        weight = _choice_weights(logits, expert, normalised=self.normalise == "before")
        routing = Routing.from_topk(
            weight * self.scale, expert=expert, num_experts=logits.shape[-1]
        )
        if not router.training or self.second != "random":
            return routing
        lost = torch.zeros_like(expert, dtype=torch.bool)
        lost[:, 1:] = 2 * weight[:, 1:] <= router.context.uniform("second choice", width=1)
        return routing.drop(lost.flatten())

    def renormalise(self, routing: Routing) -> Routing:
        return routing if self.normalise == "before" else _kept_sum_to(self.scale, routing, k=2)

    def experts_per_token(self, num_experts: int) -> float:
        return float(min(2, num_experts))


def _choice_weights(
    logits: Float[Tensor, "T E"], expert: Int[Tensor, "T K"], *, normalised: bool
) -> Float[Tensor, "T K"]:
    """Return the softmax probabilities of the selected experts, or their shares of the sum."""
    if normalised:  # equals softmax over all experts, divided by the sum over the selected
        return logits.gather(-1, expert).softmax(-1)
    return logits.softmax(-1).gather(-1, expert)


def _kept_sum_to(total: float, routing: Routing, *, k: int) -> Routing:
    """Return a routing whose weights of a token sum to ``total``, if an edge of it is left."""
    weight = routing.weight.view(-1, k)
    kept = weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    return replace(routing, weight=(weight * (total / kept)).flatten())


class SigmoidTopK(Select):
    """The k highest sigmoid scores (DeepSeek-V3, 2412.19437, equations 12 to 16).

    A balance rule's bias is added to the scores for the selection of experts and groups, never to
    weights. Weights are the selected scores divided by their sum, times ``scale``; with
    ``normalise="none"`` they are not divided (Llama 4). The division is computed as a softmax of
    logarithms: scores that all vanish get equal weights, where a sum with 1e-20 added would give
    them none. ``probabilities`` are the scores of all experts, divided by their sum.
    """

    k: int = Field(default=2, ge=1)
    normalise: Literal["before", "none"] = "before"
    scale: float = Field(default=1.0, gt=0)
    expert_groups: ExpertGroups = AllExperts()

    def __call__(self, router: RouterContext) -> Routing:
        scores = self.expert_groups(router.biased_scores(router.logits.sigmoid()))
        expert = scores.topk(self.k, dim=-1).indices
        logits = router.logits.gather(-1, expert)
        weight = normalised_sigmoid(logits) if self.normalise == "before" else logits.sigmoid()
        weight = weight * self.scale
        return Routing.from_topk(weight, expert=expert, num_experts=router.logits.shape[-1])

    def probabilities(self, router: RouterContext) -> Float[Tensor, "T E"]:
        return normalised_sigmoid(router.logits)

    def experts_per_token(self, num_experts: int) -> float:
        return float(min(self.k, num_experts))

    def problems(self, experts: int, num_null_experts: int, /) -> str | None:
        few = super().problems(experts, num_null_experts)
        return few or self.expert_groups.problems(experts, self.k)


def normalised_sigmoid(logits: Float[Tensor, "T K"]) -> Float[Tensor, "T K"]:
    """Return ``sigmoid(logits)`` divided by its sum over each row, stable for all logits."""
    return F.logsigmoid(logits).softmax(-1)


class NullTopK(Select):
    """Top-k routing over true and null experts (AdaMoE, 2406.13233).

    It needs ``null_experts=ZeroExperts(number=m)``. Weights are normalised over the true experts
    among the k; edges to null experts have weight zero and count for balance and statistics. The
    output for a token that selects null experts only is zero.
    """

    k: int = Field(default=3, ge=1)

    def __call__(self, router: RouterContext) -> Routing:
        logits = router.logits
        experts = logits.shape[-1]
        expert = router.biased_scores(logits).topk(self.k, dim=-1).indices
        null = expert >= experts - router.num_null_experts
        # finite, so that a row of null experts alone is not 0 / 0
        true = logits.gather(-1, expert).masked_fill(null, torch.finfo(logits.dtype).min)
        weight = torch.where(null, 0.0, true.softmax(-1))
        return Routing.from_topk(weight, expert=expert, num_experts=experts)

    def experts_per_token(self, num_experts: int) -> float:
        return float(min(self.k, num_experts))

    def problems(self, experts: int, num_null_experts: int, /) -> str | None:
        if not num_null_experts:
            return "null experts beside the true ones (moe.null_experts=ZeroExperts(number=8))"
        return super().problems(experts, num_null_experts)


class Hash(Select):
    """Hash routing: a hash of the token's vocabulary id selects its expert (2106.04426).

    The weight is one. The hash differs between layers and is the same in every run. Nothing is
    learned: use it with ``balance=()``, as a baseline for learned rules. The gate exists and is
    counted, but its logits are not used. The paper's balanced assignment by id frequency is not
    implemented.
    """

    balances_load: ClassVar[bool] = True

    def __call__(self, router: RouterContext) -> Routing:
        tokens, experts = router.logits.shape
        key = hash_combine(router.context.token, router.context.salt ^ hash_name("hash"))
        expert = (key % experts)[:, None]
        weight = router.logits.new_ones(tokens, 1)
        return Routing.from_topk(weight, expert=expert, num_experts=experts)

    def experts_per_token(self, num_experts: int) -> float:
        return float(min(1, num_experts))
