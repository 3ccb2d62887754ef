"""SequenceBalance: experts used evenly within each row.

Letters: T tokens of this rank, E experts, B rows of this rank, N edges.
"""

import torch

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.balance import Balance, Scores


class SequenceBalance(Balance):
    """``weight * mean over rows of sum_e f_e P_e`` (DeepSeek-V3, 2412.19437, equations 17 to 20).

    Within a row of t tokens, f_e is E times the fraction of its edges that chose expert e, and P_e
    its mean probability; ``weight`` when every row is balanced. Rows count alike whatever their
    length, and the mean is over the rows of all ranks (a row lives on one of them). The paper
    counts the experts of highest affinity, bias left out; here the edges that were chosen count,
    with a ``BiasUpdate`` too.
    """

    weight: float = 0.0001

    def __call__(self, scores: Scores) -> Float[Tensor, ""]:
        routing, probabilities = scores.routing, scores.probabilities
        rows, place = scores.gate.context.row.unique(return_inverse=True)
        count, experts = rows.numel(), probabilities.shape[1]
        every = scores.ranks.sum(probabilities.new_full((1,), count, dtype=torch.float64))
        edge = place[routing.token] * (experts + 1) + routing.expert  # lost edges come last
        chosen = torch.bincount(edge, minlength=count * (experts + 1)).view(count, experts + 1)
        chosen = chosen[:, :experts].float()
        fraction = chosen / chosen.sum(1, keepdim=True).clamp(min=1)
        tokens = torch.bincount(place, minlength=count)[:, None]
        mean = probabilities.new_zeros(count, experts).index_add(0, place, probabilities) / tokens
        return self.weight * experts * (fraction * mean).sum() / every[0].clamp(min=1).float()

    def evening(self) -> float:
        return self.weight
