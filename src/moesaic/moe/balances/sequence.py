"""SequenceBalance: experts used evenly within each row.

Letters: T tokens of this rank, E experts.
"""

import torch

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.moe.balance import Balance, BalanceInputs


class SequenceBalance(Balance):
    """``weight * mean over rows of sum_e f_e P_e`` (DeepSeek-V3, 2412.19437, equations 17 to 20).

    Within a row of t tokens, f_e is E times the fraction of its edges that chose expert e, and P_e
    its mean probability; ``weight`` when every row is balanced. Rows count alike whatever their
    length, and the mean is over the rows of all ranks, of which several may hold tokens of one (its
    key tells). The paper counts the experts of highest affinity, bias left out; here the edges that
    were chosen count, with a ``BiasUpdate`` too.
    """

    weight: float = 0.0001

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        routing, probabilities = inputs.routing, inputs.probabilities
        count, place = _global_rows(inputs)
        experts = probabilities.shape[1]
        edge = place[routing.token] * (experts + 1) + routing.expert  # lost edges come last
        chosen = torch.bincount(edge, minlength=count * (experts + 1)).view(count, experts + 1)
        tokens = torch.bincount(place, minlength=count)
        chosen, tokens = inputs.batch_group.sum(
            torch.cat([chosen[:, :experts], tokens[:, None]], 1).double()
        ).split([experts, 1], 1)
        fraction = (chosen / chosen.sum(1, keepdim=True).clamp(min=1)).float()
        mean = probabilities.new_zeros(count, experts).index_add(0, place, probabilities) / tokens
        return self.weight * experts * (fraction * mean.float()).sum() / max(count, 1)

    def balancing_weight(self) -> float:
        return self.weight


def _global_rows(inputs: BalanceInputs) -> tuple[int, Int[Tensor, "T"]]:
    """Return how many rows all ranks hold tokens of, and which of them each token here is of."""
    context = inputs.router.context
    named = torch.stack([context.row_key, context.row], 1)
    own, place = named.unique(dim=0, return_inverse=True)
    held = inputs.batch_group.gather(own)
    every, number = held.rows.unique(dim=0, return_inverse=True)
    return every.shape[0], number[held.start + place]
