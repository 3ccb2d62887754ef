"""Select: from router logits to edges.

Letters: T tokens, E experts, K experts per token, N edges.
"""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor
from moesaic.moe.among import AllExperts, ExpertGroups
from moesaic.moe.gate import RouterContext, StatefulRule
from moesaic.moe.routing import Routing


class Select(Choice, StatefulRule):
    """Family of selection rules; what they see is a ``Gate``.

    ``causal`` is false of a rule whose answer for a token depends on later tokens: a decoder, which
    does not have them yet when it writes, refuses it. ``by_row`` is true of one that compares the
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
