"""Threshold: every expert whose score passes a bar, whatever other tokens and experts score.

Letters: T tokens, E experts.
"""

from pydantic import Field

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.gate import RouterContext
from moesaic.moe.routing import Routing
from moesaic.moe.select import Select
from moesaic.moe.selects.sigmoid import normalised_sigmoid


class Threshold(Select):
    """An edge wherever ``sigmoid(logit) > p``, weighing that sigmoid (MoDification, 2410.14268).

    With one expert it is a mixture-of-depths feed-forward: a token passes it, or its stream goes on
    unchanged. No token looks at another, so what is decided for a prefix stays decided, unlike the
    top-k over a sequence that it replaces (mixture of depths, 2404.02258). Ours: weighing by the
    sigmoid, and a use with several experts. The paper's attention that skips tokens, and their keys
    and values, is not here.

    How many edges there are is learnt (see ``KeptFraction``). ``expected`` is the share of all
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
