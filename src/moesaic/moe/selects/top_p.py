"""TopP: as many experts as a token's uncertainty asks for.

Letters: T tokens, E experts.
"""

import math

import torch
import torch.nn.functional as F
from pydantic import Field

from moesaic.moe.gate import RouterContext
from moesaic.moe.routing import Routing
from moesaic.moe.select import Select


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
