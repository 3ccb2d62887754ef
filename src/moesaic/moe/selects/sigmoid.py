"""SigmoidTopK: experts scored one by one, without a softmax over all of them.

Letters: T tokens, E experts, K experts per token.
"""

import torch.nn.functional as F
from pydantic import Field

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.among import AllExperts, ExpertGroups
from moesaic.moe.gate import RouterContext
from moesaic.moe.routing import Routing
from moesaic.moe.select import Select


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
