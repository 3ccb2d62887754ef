"""DeviceBalance: groups of experts used evenly, whatever happens within a group.

Letters: E experts, D groups.
"""

import torch
from pydantic import Field

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.balance import Balance, BalanceInputs
from moesaic.moe.limit import Limit


class DeviceBalance(Balance):
    """``weight * sum_i f'_i P'_i`` over ``groups`` of experts (2401.06066, equations 15 to 17).

    f'_i is the mean over the group's experts of E times the fraction of edges that chose them, P'_i
    the sum of their mean probabilities; ``weight`` when groups are balanced. Groups are of
    neighbours, as they would be placed on devices; spare experts, which are nowhere, are in none.
    """

    weight: float = 0.05
    num_groups: int = Field(default=2, ge=1)

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        working = inputs.load.numel() - inputs.router.num_null_experts
        share = inputs.load[:working] / inputs.load.sum().clamp(min=1)
        used = inputs.load.numel() * share.float().view(self.num_groups, -1).mean(1)
        mean = inputs.probabilities[:, :working].sum(0) / inputs.num_tokens.clamp(min=1).float()
        return self.weight * torch.dot(used, mean.view(self.num_groups, -1).sum(1))

    def balancing_weight(self) -> float:
        return self.weight

    def problems(self, *, experts: int, limit: Limit) -> str | None:
        del limit
        if experts % self.num_groups == 0:
            return None
        return f"groups to divide the experts, not {self.num_groups} groups of {experts}"
