"""DenseAll: every expert while training, few when it counts.

Letters: T tokens, E experts, K experts per token.
"""

import torch
from pydantic import Field

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor
from moesaic.moe.gate import RouterContext
from moesaic.moe.routing import Routing
from moesaic.moe.select import Select


class InferenceSelect(Choice):
    """Family: which experts are asked outside training. Weights stay plain probabilities."""

    def __call__(self, weight: Float[Tensor, "T E"]) -> Routing:
        """Return the edges."""
        raise NotImplementedError


class AllAtInference(InferenceSelect):
    """Every expert, as in training."""

    def __call__(self, weight: Float[Tensor, "T E"]) -> Routing:
        return _all_experts(weight)


class TopKAtInference(InferenceSelect):
    """The k likeliest (DS-MoE's first way); all of them where there are fewer."""

    k: int = Field(default=2, ge=1)

    def __call__(self, weight: Float[Tensor, "T E"]) -> Routing:
        experts = weight.shape[-1]
        top = weight.topk(min(self.k, experts), dim=-1)
        return Routing.from_topk(top.values, expert=top.indices, num_experts=experts)


class ThresholdAtInference(InferenceSelect):
    """Those with ``E * probability > epsilon`` (DS-MoE's second way): never none."""

    epsilon: float = Field(default=0.48, gt=0, lt=1)

    def __call__(self, weight: Float[Tensor, "T E"]) -> Routing:
        return Routing.from_mask(weight, chosen=weight * weight.shape[-1] > self.epsilon)


class DenseAll(Select):
    """All experts in training, weighed by a softmax (DS-MoE, 2404.05567).

    Every expert gets a gradient from every token; ``MutualInformation`` teaches the router to be
    sure of a few, so that ``inference`` may leave the others out. FLOPs and bytes are those of
    training.
    """

    inference: InferenceSelect = TopKAtInference()

    def __call__(self, router: RouterContext) -> Routing:
        weight = router.logits.softmax(-1)
        return _all_experts(weight) if router.training else self.inference(weight)

    def experts_per_token(self, num_experts: int) -> float:
        return float(num_experts)

    def problems(self, *, experts: int, num_null_experts: int) -> str | None:
        del experts, num_null_experts
        return None


def _all_experts(weight: Float[Tensor, "T E"]) -> Routing:
    tokens, experts = weight.shape
    every = torch.arange(experts, device=weight.device).expand(tokens, -1)
    return Routing.from_topk(weight, expert=every, num_experts=experts)
