"""Selection rules with a variable number of experts per token: threshold, top-p, expert choice.

Letters: T tokens, E experts.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Int, Tensor
from moesaic.moe.expert_selection import Select, normalised_sigmoid
from moesaic.moe.router_context import RouterContext
from moesaic.moe.routing import Routing


class Threshold(Select):
    """An edge for each ``sigmoid(logit) > p``, weighted by it (MoDification, 2410.14268).

    With one expert it is a mixture-of-depths feed-forward, which a token passes or skips. The
    decision for a token does not depend on other tokens, so it is causal, unlike the top-k over a
    sequence that it replaces (mixture of depths, 2404.02258). Ours: the sigmoid as weight, and the
    use with several experts. The paper's attention that skips tokens is not implemented.

    The number of edges is learned (see ``TargetLoadBalance``). ``expected_fraction`` is the share
    of all token-expert pairs from which FLOPs and bytes are counted; it changes nothing else.
    """

    variable_k: ClassVar[bool] = True
    p: float = Field(default=0.5, ge=0, lt=1)
    expected_fraction: float = Field(default=0.5, gt=0, le=1)

    def __call__(self, router: RouterContext) -> Routing:
        weight = router.logits.sigmoid()
        return Routing.from_mask(weight, chosen=router.biased_scores(weight) > self.p)

    def probabilities(self, router: RouterContext) -> Float[Tensor, "T E"]:
        return normalised_sigmoid(router.logits)

    def experts_per_token(self, num_experts: int) -> float:
        return self.expected_fraction * num_experts


class TopP(Select):
    """Top-p routing: the most probable experts until they sum to more than p (2403.07652).

    The expert that crosses p is included, and weights are plain probabilities. Where rounding
    keeps the sum of all experts below p, all are selected. ``max_experts`` limits their number
    (None: no limit), which is ours. A balance rule's bias changes the order, not the sums.

    FLOPs and bytes are counted for the largest possible number of experts, which is what an
    untrained router selects.
    """

    variable_k: ClassVar[bool] = True
    p: float = Field(default=0.4, ge=0, lt=1)
    max_experts: int | None = Field(default=None, ge=1)

    def __call__(self, router: RouterContext) -> Routing:
        probability = router.logits.softmax(-1)
        order = router.biased_scores(probability).argsort(dim=-1, descending=True, stable=True)
        sums = probability.detach().gather(-1, order).cumsum(-1)
        taken = F.pad(sums[:, :-1], (1, 0)) <= self.p  # the sum of the more probable ones
        taken[:, self._max_experts(router.logits.shape[-1]) :] = False
        chosen = torch.zeros_like(taken).scatter(-1, order, taken)
        return Routing.from_mask(probability, chosen=chosen)

    def experts_per_token(self, num_experts: int) -> float:
        return float(min(math.floor(self.p * num_experts) + 1, self._max_experts(num_experts)))

    def _max_experts(self, num_experts: int) -> int:
        return num_experts if self.max_experts is None else min(self.max_experts, num_experts)


class ExpertChoice(Select):
    """Each expert selects its ``capacity_factor * n / E`` best of a row's n tokens (2202.09368).

    Scores are a softmax over experts, and weights are the plain scores of the selected pairs. A
    token may have no expert, or all. The paper selects over a batch; here each row (one text,
    rounded up, at least one token) is separate, so the output depends neither on the rest of the
    batch nor on the number of ranks.

    Not causal: whether a token is selected depends on later tokens. Not allowed in a decoder.
    """

    causal: ClassVar[bool] = False
    needs_whole_rows: ClassVar[bool] = True
    variable_k: ClassVar[bool] = True
    balances_load: ClassVar[bool] = True
    capacity_factor: float = Field(default=2.0, gt=0)

    def __call__(self, router: RouterContext) -> Routing:
        scores, row = router.logits.softmax(-1), router.context.row
        place = _rank_within_row(router.biased_scores(scores), row=row)
        ordered = row.sort().values  # not bincount, whose size the host waits for
        length = torch.searchsorted(ordered, row, right=True) - torch.searchsorted(ordered, row)
        capacity = (length.float() * (self.capacity_factor / scores.shape[-1])).ceil().long()
        return Routing.from_mask(scores, chosen=place < capacity[:, None])

    def experts_per_token(self, num_experts: int) -> float:
        return min(self.capacity_factor, float(num_experts))


def _rank_within_row(scores: Float[Tensor, "T E"], *, row: Int[Tensor, "T"]) -> Int[Tensor, "T E"]:
    """Return each token's rank within its row, for each expert: 0 for the highest score."""
    best = scores.argsort(dim=0, descending=True, stable=True)
    order = best.gather(0, row[best].argsort(dim=0, stable=True))
    queue = row[order[:, 0]]  # rows one after the other, the same for every expert
    place = torch.arange(len(queue), device=row.device) - torch.searchsorted(queue, queue)
    return torch.empty_like(order).scatter(0, order, place[:, None].expand_as(order))


class InferenceSelect(Choice):
    """Family: the experts that ``DenseAll`` uses outside training, weighted by probabilities."""

    def __call__(self, weight: Float[Tensor, "T E"]) -> Routing:
        """Return the edges."""
        raise NotImplementedError


class AllAtInference(InferenceSelect):
    """All experts, as in training."""

    def __call__(self, weight: Float[Tensor, "T E"]) -> Routing:
        return _all_experts(weight)


class TopKAtInference(InferenceSelect):
    """The k most probable experts (DS-MoE's first way), at most all."""

    k: int = Field(default=2, ge=1)

    def __call__(self, weight: Float[Tensor, "T E"]) -> Routing:
        experts = weight.shape[-1]
        top = weight.topk(min(self.k, experts), dim=-1)
        return Routing.from_topk(top.values, expert=top.indices, num_experts=experts)


class ThresholdAtInference(InferenceSelect):
    """The experts with ``E * probability > epsilon`` (DS-MoE's second way): at least one."""

    epsilon: float = Field(default=0.48, gt=0, lt=1)

    def __call__(self, weight: Float[Tensor, "T E"]) -> Routing:
        return Routing.from_mask(weight, chosen=weight * weight.shape[-1] > self.epsilon)


class DenseAll(Select):
    """All experts in training, weighted by a softmax (DS-MoE, 2404.05567).

    Every expert gets a gradient from every token. ``MutualInformationBalance`` makes the router
    prefer a few experts, so that ``inference`` may use only those. FLOPs and bytes are those of
    training.
    """

    variable_k: ClassVar[bool] = True
    balances_load: ClassVar[bool] = True
    inference: InferenceSelect = TopKAtInference()

    def __call__(self, router: RouterContext) -> Routing:
        weight = router.logits.softmax(-1)
        return _all_experts(weight) if router.training else self.inference(weight)

    def experts_per_token(self, num_experts: int) -> float:
        return float(num_experts)


def _all_experts(weight: Float[Tensor, "T E"]) -> Routing:
    tokens, experts = weight.shape
    every = torch.arange(experts, device=weight.device).expand(tokens, -1)
    return Routing.from_topk(weight, expert=every, num_experts=experts)
