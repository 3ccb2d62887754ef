"""BiasUpdate: balance without a loss.

Letters: E experts.

AdaptiveBalance: a Switch loss that grows while experts overflow and fades while they do not.

Letters: E experts.

NullBalance: true experts evenly used, null experts as one.

Letters: E experts (null ones included).
"""

import torch
from pydantic import Field

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.balance import Balance, BalanceInputs, load_balance_loss
from moesaic.moe.limit import Dropless, Limit
from moesaic.moe.router_context import RoutingStats, RuleState


class BiasUpdate(Balance):
    """Auxiliary-loss-free balancing (2408.15664, algorithm 1): loss zero, gradient none.

    Each expert has a bias that is added to its score when experts are chosen, in training and
    after, and never to a weight. After an optimizer step it goes up by ``rate`` where the expert
    had less than the mean load of the step (all micro-batches and ranks), down where it had more.
    The select says what a score is; the paper's are sigmoids, ``TopK`` adds to logits.
    """

    rate: float = Field(default=0.001, gt=0)

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        return inputs.zero()

    def selection_bias(self, state: RuleState) -> Float[Tensor, "E"] | None:
        return state["bias"]

    def initial_state(self, num_experts: int) -> dict[str, Tensor]:
        return {"bias": torch.zeros(num_experts)}

    def update_state(self, state: RuleState, *, stats: RoutingStats) -> RuleState:
        wanting = stats.load.mean() - stats.load
        return {"bias": state["bias"] + self.rate * wanting.sign().float()}


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


class NullBalance(Balance):
    """``alpha * E * sum_e f_e p_e``, f of a null expert being their mean (AdaMoE, 2406.13233).

    So nothing pushes null experts to be used alike, only their total counts. f_e is the fraction
    of all edges that chose expert e, p_e its mean probability in a softmax over all E. alpha goes
    from ``weight`` to ``final`` in equal parts over ``steps`` optimizer steps (the two ends are the
    paper's, the line between them is ours).
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

    def balancing_weight(self) -> float:
        return self.weight

    def initial_state(self, num_experts: int) -> dict[str, Tensor]:
        del num_experts
        return {"step": torch.zeros(())}

    def update_state(self, state: RuleState, *, stats: RoutingStats) -> RuleState:
        del stats
        return {"step": state["step"] + 1}
