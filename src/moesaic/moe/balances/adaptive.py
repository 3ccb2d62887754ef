"""AdaptiveBalance: a Switch loss that grows while experts overflow and fades while they do not.

Letters: E experts.
"""

import torch
from pydantic import Field

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.balance import Balance, BalanceInputs, load_balance_loss
from moesaic.moe.gate import RoutingStats, RuleState
from moesaic.moe.limit import Dropless, Limit


class AdaptiveBalance(Balance):
    """``scale * weight * E * sum_e f_e p_e``; the scale follows the share of edges over capacity.

    As in axlearn's ``AdaptiveLoadBalanceLoss`` (the code beside 2405.15052): after each step a
    moving average of the share that the limit dropped is taken, and the logarithm of the scale
    goes up by ``log_step`` where it is above ``most``, down where it is below ``least``. There the
    share is that of the worse of two choices and the new scale serves the same step; here it is
    that of all edges and serves the next, so that a recomputed forward pass sees the same.
    ``memory`` is the least weight of the newest step in the average (the n-th step has 1/n before).
    """

    weight: float = 0.01
    max_dropped: float = Field(default=0.05, gt=0)
    min_dropped: float = Field(default=0.001, ge=0)
    log_step: float = Field(default=0.01, gt=0)
    ema_weight: float = Field(default=0.01, gt=0, le=1)

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        scale = inputs.router.state["log_scale"].exp()
        return scale * self.weight * load_balance_loss(inputs, load=inputs.load)

    def balancing_weight(self) -> float:
        return self.weight

    def problems(self, *, experts: int, limit: Limit) -> str | None:
        del experts
        return "a limit that can drop edges, not Dropless" if isinstance(limit, Dropless) else None

    def initial_state(self, num_experts: int) -> dict[str, Tensor]:
        del num_experts
        return {name: torch.zeros(()) for name in ("log_scale", "average", "steps")}

    def update_state(self, state: RuleState, *, stats: RoutingStats) -> RuleState:
        total = stats.load.sum()
        over = (total - stats.kept_load.sum()) / total.clamp(min=1)
        steps = state["steps"] + 1
        newest = (1 / steps).clamp(min=self.ema_weight)
        average = state["average"] + newest * (over.float() - state["average"])
        move = (average > self.max_dropped).float() - (average < self.min_dropped).float()
        log_scale = state["log_scale"] + self.log_step * move
        return {"log_scale": log_scale, "average": average, "steps": steps}
