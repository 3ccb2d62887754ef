"""GlobalBatchBalance and MicroBatchBalance: over which tokens the load is to be even.

Letters: E experts, R ranks.
"""

import torch

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.balance import Balance, BalanceInputs, load_balance_loss


class GlobalBatchBalance(Balance):
    """``weight * E * sum_e f_e p_e``, f over the optimizer step so far (2501.11873, section 3).

    f_e is the fraction of edges that chose expert e on all ranks and in all micro-batches of the
    step up to this one (the paper's buffer); p_e is that of this micro-batch. A row of one domain
    may then use few experts as long as the step uses all. In the last micro-batch f is exactly that
    of one large batch. Without accumulation this is ``SwitchBalance``, whose f is that of all ranks
    already.
    """

    weight: float = 0.01

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        return self.weight * load_balance_loss(inputs, load=inputs.accumulated_load + inputs.load)

    def balancing_weight(self) -> float:
        return self.weight


class MicroBatchBalance(Balance):
    """The mean over ranks of each rank's own Switch loss: what 2501.11873 compares with.

    Every rank is to use all experts on its own part of a micro-batch, so the loss depends on how
    the batch is shared out, on purpose. Ranks without a token do not count.
    """

    weight: float = 0.01

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        tokens = inputs.routing.num_tokens
        busy = inputs.batch_group.sum(inputs.num_tokens.new_full((1,), float(tokens > 0)))
        load = inputs.routing.load()
        fraction = (load / load.sum().clamp(min=1)).float()
        mean = inputs.probabilities.sum(0) / max(tokens, 1)
        own = self.weight * load.numel() * torch.dot(fraction, mean)
        return own / busy[0].clamp(min=1).float()

    def balancing_weight(self) -> float:
        return self.weight
