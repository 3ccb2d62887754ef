"""Auxiliary losses whose weight adapts during training, by the load or by a schedule.

Letters: E experts (null experts included).
"""

import torch
from pydantic import Field

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.auxiliary_losses import (
    Balance,
    BalanceInputs,
    LoadBalancingLoss,
    load_balance_loss,
)
from moesaic.moe.expert_capacity import Dropless, Limit
from moesaic.moe.router_context import RoutingStats, RuleState


class AdaptiveBalance(LoadBalancingLoss, Balance):
    """``scale * weight * E * sum_e f_e p_e``; the scale follows the share of dropped edges.

    As in axlearn's ``AdaptiveLoadBalanceLoss`` (the code of 2405.15052): each step updates a moving
    average of the share of edges that the limit dropped, and moves the logarithm of the scale by
    ``log_step``, up if the average is above ``max_dropped``, down if below ``min_dropped``. There
    the share is that of the worse of two choices and the new scale applies to the same step; here
    it is that of all edges and applies to the next, so that activation checkpointing repeats the
    same forward pass. ``ema_weight`` is the smallest weight of the newest step in the average (the
    n-th step has 1/n before).
    """

    weight: float = 0.01
    max_dropped: float = Field(default=0.05, gt=0)
    min_dropped: float = Field(default=0.001, ge=0)
    log_step: float = Field(default=0.01, gt=0)
    ema_weight: float = Field(default=0.01, gt=0, le=1)

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        scale = inputs.router.state["log_scale"].exp()
        return scale * self.weight * load_balance_loss(inputs, load=inputs.load)

    def problems(self, _experts: int, limit: Limit, /) -> str | None:
        return "a limit that can drop edges, not Dropless" if isinstance(limit, Dropless) else None

    def initial_state(self, _num_experts: int, /) -> dict[str, Tensor]:
        return {name: torch.zeros(()) for name in ("log_scale", "average", "steps")}

    def update_state(self, state: RuleState, stats: RoutingStats, /) -> RuleState:
        total = stats.load.sum()
        over = (total - stats.kept_load.sum()) / total.clamp(min=1)
        steps = state["steps"] + 1
        newest = (1 / steps).clamp(min=self.ema_weight)
        average = state["average"] + newest * (over.float() - state["average"])
        move = (average > self.max_dropped).float() - (average < self.min_dropped).float()
        log_scale = state["log_scale"] + self.log_step * move
        return {"log_scale": log_scale, "average": average, "steps": steps}


class NullBalance(LoadBalancingLoss, Balance):
    """``alpha * E * sum_e f_e p_e``, f of a null expert being their mean (AdaMoE, 2406.13233).

    The loss depends on the total load of the null experts, not on its distribution. f_e is the
    fraction of all edges of expert e, p_e its mean probability in a softmax over all E. alpha goes
    linearly from ``weight`` to ``final_weight`` over ``decay_steps`` optimizer steps (the two ends
    are the paper's, the linear schedule is ours).
    """

    weight: float = Field(default=0.02, ge=0)
    final_weight: float = Field(default=0.0001, ge=0)
    decay_steps: int = Field(default=1000, ge=1)

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        load = inputs.load
        fraction = load / load.sum().clamp(min=1)
        true = load.numel() - inputs.router.num_null_experts
        if inputs.router.num_null_experts:
            nulls = fraction[true:].mean().expand(inputs.router.num_null_experts)
            fraction = torch.cat([fraction[:true], nulls])
        mean = inputs.probabilities.sum(0) / inputs.num_tokens.clamp(min=1).float()
        done = (inputs.router.state["step"] / self.decay_steps).clamp(max=1)
        alpha = self.weight + (self.final_weight - self.weight) * done
        return alpha * load.numel() * torch.dot(fraction.float(), mean)

    def initial_state(self, _num_experts: int, /) -> dict[str, Tensor]:
        return {"step": torch.zeros(())}

    def update_state(self, state: RuleState, _stats: RoutingStats, /) -> RuleState:
        return {"step": state["step"] + 1}
