"""NullBalance: true experts evenly used, null experts as one.

Letters: E experts (null ones included).
"""

import torch
from pydantic import Field

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.balance import Balance, BalanceInputs
from moesaic.moe.gate import RoutingStats, RuleState


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
