"""KeptFraction: the share of tokens that pass a bar, held at a target.

Letters: E experts.
"""

from typing import ClassVar

from pydantic import Field

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.balance import Balance, BalanceInputs


class TargetLoadBalance(Balance):
    """``weight * mean over experts of (f_e - target)^2``, for ``Threshold``. Ours.

    f_e is the fraction of tokens that expert e has an edge to. A count has no gradient: that of the
    mean sigmoid score stands in for it (a straight-through estimate), so all tokens' scores move up
    when too few pass, and down when too many do. MoDification (2410.14268) says no more than that a
    threshold takes the place of a top-k.
    """

    name: ClassVar[str] = "kept"
    target: float = Field(default=0.5, gt=0, lt=1)
    weight: float = Field(default=1.0, ge=0)

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        tokens, score = inputs.num_tokens.clamp(min=1), inputs.logits.sigmoid()
        miss = (inputs.load / tokens - self.target).float()
        own = score.shape[0] / tokens.float()
        moved = (score - score.detach()).sum(0) / tokens.float()  # zero, but for its gradient
        return self.weight * (own * miss.square() + 2 * miss * moved).mean()
