"""Importance: the variation of what experts weigh, over a whole batch.

Letters: E experts.
"""

import torch

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.balance import Balance, BalanceInputs


class ImportanceBalance(Balance):
    """``weight * CV(importance)^2`` (1701.06538, equations 6 and 7).

    The importance of an expert is the sum of its weights (G(x)) over the tokens of the batch, on
    all ranks, before any limit; CV^2 is its variance over experts divided by its squared mean: 0
    when balanced, E - 1 when collapsed. The load term beside it in the paper belongs to that
    paper's noisy gating and is not here.
    """

    weight: float = 0.1

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        routing = inputs.routing
        zero = inputs.logits.new_zeros(inputs.load.numel() + 1)
        own = zero.index_add(0, routing.expert, routing.weight)[:-1]
        whole = inputs.batch_group.sum(own.detach().double()).requires_grad_()
        with torch.enable_grad():
            value = self.weight * squared_coefficient_of_variation(whole)
            (slope,) = torch.autograd.grad(value, whole)
        # not linear in the sums of ranks: each rank has a part of the value by its tokens, and of
        # the gradient what the whole's slope says of its own sums
        moved = torch.dot(slope.float(), own)
        part = routing.num_tokens / inputs.num_tokens.clamp(min=1)
        return moved - moved.detach() + (value.detach() * part).float()

    def balancing_weight(self) -> float:
        return self.weight


def squared_coefficient_of_variation(x: Float[Tensor, "E"]) -> Float[Tensor, ""]:
    """Return the squared coefficient of variation, 0 for zeros."""
    mean = x.mean()
    return x.var(correction=0) / mean.square().clamp(min=torch.finfo(x.dtype).tiny)
