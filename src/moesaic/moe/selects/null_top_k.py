"""NullTopK: choices that may be spent on experts that do nothing.

Letters: T tokens, E experts (null ones included), K choices per token.
"""

import torch
from pydantic import Field

from moesaic.moe.gate import RouterContext
from moesaic.moe.routing import Routing
from moesaic.moe.select import Select


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
            return "null experts beside the true ones (moe.spare=ZeroExperts(number=8))"
        return super().problems(experts=experts, num_null_experts=num_null_experts)
