"""Threshold: every expert whose score passes a bar, whatever other tokens and experts score.

Letters: T tokens, E experts.

TopP: as many experts as a token's uncertainty asks for.

Letters: T tokens, E experts.

ExpertChoice: experts choose their tokens, so they are balanced by construction.

Letters: T tokens, E experts.

DenseAll: every expert while training, few when it counts.

Letters: T tokens, E experts, K experts per token.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Int, Tensor
from moesaic.moe.router_context import RouterContext
from moesaic.moe.routing import Routing
from moesaic.moe.select import Select, normalised_sigmoid


class Threshold(Select):
    """An edge wherever ``sigmoid(logit) > p``, weighing that sigmoid (MoDification, 2410.14268).

    With one expert it is a mixture-of-depths feed-forward: a token passes it, or its stream goes on
    unchanged. No token looks at another, so what is decided for a prefix stays decided, unlike the
    top-k over a sequence that it replaces (mixture of depths, 2404.02258). Ours: weighing by the
    sigmoid, and a use with several experts. The paper's attention that skips tokens, and their keys
    and values, is not here.

    How many edges there are is learnt (see ``TargetLoadBalance``). ``expected`` is the share of all
    pairs that FLOPs and bytes are counted with, and changes nothing else.
    """

    p: float = Field(default=0.5, ge=0, lt=1)
    expected_fraction: float = Field(default=0.5, gt=0, le=1)

    def __call__(self, router: RouterContext) -> Routing:
        weight = router.logits.sigmoid()
        return Routing.from_mask(weight, chosen=router.biased_scores(weight) > self.p)

    def probabilities(self, router: RouterContext) -> Float[Tensor, "T E"]:
        return normalised_sigmoid(router.logits)

    def experts_per_token(self, num_experts: int) -> float:
        return self.expected_fraction * num_experts

    def problems(self, *, experts: int, num_null_experts: int) -> str | None:
        del experts, num_null_experts
        return None


class TopP(Select):
    """The likeliest experts until their probabilities sum to more than p (2403.07652).

    The expert that crosses p is among them, and weights are plain probabilities. Where rounding
    keeps even the sum of all from exceeding p, all are chosen. ``most`` caps their number (None: no
    cap), which is ours. A balance rule's bias changes the order, not what is summed.

    Edges are as many as were chosen. FLOPs and bytes are counted with the most that can be, which
    is what a router that knows nothing yet asks for.
    """

    p: float = Field(default=0.4, ge=0, lt=1)
    max_experts: int | None = Field(default=None, ge=1)

    def __call__(self, router: RouterContext) -> Routing:
        probability = router.logits.softmax(-1)
        order = router.biased_scores(probability).argsort(dim=-1, descending=True, stable=True)
        sums = probability.detach().gather(-1, order).cumsum(-1)
        taken = F.pad(sums[:, :-1], (1, 0)) <= self.p  # what the better ones sum to
        taken[:, self._max_experts(router.logits.shape[-1]) :] = False
        chosen = torch.zeros_like(taken).scatter(-1, order, taken)
        return Routing.from_mask(probability, chosen=chosen)

    def experts_per_token(self, num_experts: int) -> float:
        return float(min(math.floor(self.p * num_experts) + 1, self._max_experts(num_experts)))

    def problems(self, *, experts: int, num_null_experts: int) -> str | None:
        del experts, num_null_experts
        return None

    def _max_experts(self, num_experts: int) -> int:
        return num_experts if self.max_experts is None else min(self.max_experts, num_experts)


class ExpertChoice(Select):
    """Each expert takes its ``factor * n / E`` best of a row's n tokens (2202.09368, section 3.2).

    Scores are a softmax over experts and weights the plain scores of the pairs that were made. A
    token may have no expert, or all. The paper chooses over a batch; here over each row of it (one
    text, rounded up, at least one token), so an answer depends neither on what else is in the batch
    nor on how many ranks share it.

    Not causal: whether a token is taken depends on those after it. A decoder refuses it.
    """

    causal: ClassVar[bool] = False
    needs_whole_rows: ClassVar[bool] = True

    capacity_factor: float = Field(default=2.0, gt=0)

    def __call__(self, router: RouterContext) -> Routing:
        scores, row = router.logits.softmax(-1), router.context.row
        place = _rank_within_row(router.biased_scores(scores), row=row)
        length = torch.bincount(row)[row].float()
        room = (length * (self.capacity_factor / scores.shape[-1])).ceil().long()
        return Routing.from_mask(scores, chosen=place < room[:, None])

    def experts_per_token(self, num_experts: int) -> float:
        return min(self.capacity_factor, float(num_experts))

    def problems(self, *, experts: int, num_null_experts: int) -> str | None:
        del experts, num_null_experts
        return None


def _rank_within_row(scores: Float[Tensor, "T E"], *, row: Int[Tensor, "T"]) -> Int[Tensor, "T E"]:
    """Return each token's place among its row, for each expert: 0 for the highest score."""
    best = scores.argsort(dim=0, descending=True, stable=True)
    order = best.gather(0, row[best].argsort(dim=0, stable=True))
    queue = row[order[:, 0]]  # rows one after the other, the same for every expert
    place = torch.arange(len(queue), device=row.device) - torch.searchsorted(queue, queue)
    return torch.empty_like(order).scatter(0, order, place[:, None].expand_as(order))


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

    Every expert gets a gradient from every token; ``MutualInformationBalance`` teaches the router to be
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
