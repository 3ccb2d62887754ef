"""DeviceBalance: groups of experts used evenly, whatever happens within a group.

Letters: E experts, D groups.
"""

import torch
from pydantic import Field

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.balance import Balance, Scores
from moesaic.moe.limit import Limit


class DeviceBalance(Balance):
    """``weight * sum_i f'_i P'_i`` over ``groups`` of experts (2401.06066, equations 15 to 17).

    f'_i is the mean over the group's experts of E times the fraction of edges that chose them, P'_i
    the sum of their mean probabilities; ``weight`` when groups are balanced. Groups are of
    neighbours, as they would be placed on devices; spare experts, which are nowhere, are in none.
    """

    weight: float = 0.05
    groups: int = Field(default=2, ge=1)

    def __call__(self, scores: Scores) -> Float[Tensor, ""]:
        working = scores.load.numel() - scores.gate.spare
        share = scores.load[:working] / scores.load.sum().clamp(min=1)
        used = scores.load.numel() * share.float().view(self.groups, -1).mean(1)
        mean = scores.probabilities[:, :working].sum(0) / scores.tokens.clamp(min=1).float()
        return self.weight * torch.dot(used, mean.view(self.groups, -1).sum(1))

    def evening(self) -> float:
        return self.weight

    def problems(self, *, experts: int, limit: Limit) -> str | None:
        del limit
        if experts % self.groups == 0:
            return None
        return f"groups to divide the experts, not {self.groups} groups of {experts}"
