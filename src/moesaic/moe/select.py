"""Select: from router logits to edges.

Letters: T tokens, E experts, K experts per token, N edges.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor
from moesaic.moe.routing import Routing


class Select(Choice):
    """Family of selection rules. ``training`` matters only to rules that sample."""

    def __call__(self, logits: Float[Tensor, "T E"], *, training: bool) -> Routing:
        """Return the edges of float32 logits, weights in the graph."""
        raise NotImplementedError

    def finish(self, routing: Routing) -> Routing:
        """Adjust weights once a limit has dropped edges; most rules leave them."""
        return routing

    def experts_per_token(self, num_experts: int) -> float:
        """Edges per token, on average: what FLOPs are counted with."""
        raise NotImplementedError


class TopK(Select):
    """Each token's k likeliest experts (1701.06538).

    ``normalise`` says when weights are made to sum to one over the chosen: ``before`` a limit drops
    edges (Mixtral; a dropped edge takes its share with it), ``after`` (DeepSpeed: survivors share
    everything), or ``none`` (DeepSeekMoE, 2401.06066: plain softmax probabilities).
    """

    k: int = Field(default=2, ge=1)
    normalise: Literal["before", "after", "none"] = "before"

    def __call__(self, logits: Float[Tensor, "T E"], *, training: bool) -> Routing:
        del training
        if self.normalise == "before":
            top, expert = logits.topk(self.k, dim=-1)
            weight = top.softmax(-1)  # equals softmax over all, then divided by the chosen sum
        else:
            weight, expert = logits.softmax(-1).topk(self.k, dim=-1)
        return Routing.from_topk(weight, expert=expert, num_experts=logits.shape[-1])

    def finish(self, routing: Routing) -> Routing:
        if self.normalise != "after":
            return routing
        weight = routing.weight.view(-1, self.k)
        total = weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
        return replace(routing, weight=(weight / total).flatten())

    def experts_per_token(self, num_experts: int) -> float:
        return float(min(self.k, num_experts))


class SwitchTop1(Select):
    """The likeliest expert, weighted by its softmax probability (2101.03961, equations 1 and 2)."""

    def __call__(self, logits: Float[Tensor, "T E"], *, training: bool) -> Routing:
        del training
        weight, expert = logits.softmax(-1).max(-1, keepdim=True)
        return Routing.from_topk(weight, expert=expert, num_experts=logits.shape[-1])

    def experts_per_token(self, num_experts: int) -> float:
        return float(min(1, num_experts))


class Top2(Select):
    """GShard's two experts (2006.16668, section 2.2), weights normalised over the two.

    ``second``: ``highest``, or in training ``sampled`` from the softmax over the others (Gumbel-max
    as in DeepSpeed, but in evaluation always the highest, which DeepSpeed's is not).
    """

    second: Literal["highest", "sampled"] = "highest"

    def __call__(self, logits: Float[Tensor, "T E"], *, training: bool) -> Routing:
        first = logits.argmax(-1, keepdim=True)
        rest = logits.detach()
        if training and self.second == "sampled":
            rest = rest - torch.empty_like(rest).exponential_().log_()
        second = rest.scatter(-1, first, float("-inf")).argmax(-1, keepdim=True)
        expert = torch.cat([first, second], -1)
        weight = logits.gather(-1, expert).softmax(-1)
        return Routing.from_topk(weight, expert=expert, num_experts=logits.shape[-1])

    def experts_per_token(self, num_experts: int) -> float:
        return float(min(2, num_experts))
