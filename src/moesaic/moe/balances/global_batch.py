"""GlobalBatchBalance and MicroBatchBalance: over which tokens the load is to be even.

Letters: E experts, R ranks.
"""

import torch

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.balance import Balance, Scores, agreement


class GlobalBatchBalance(Balance):
    """``weight * E * sum_e f_e p_e``, f over the optimizer step so far (2501.11873, section 3).

    f_e is the fraction of edges that chose expert e on all ranks and in all micro-batches of the
    step up to this one (the paper's buffer); p_e is that of this micro-batch. A row of one domain
    may then use few experts as long as the step uses all. In the last micro-batch f is exactly that
    of one large batch. Without accumulation this is ``SwitchBalance``, whose f is that of all ranks
    already.
    """

    weight: float = 0.01

    def __call__(self, scores: Scores) -> Float[Tensor, ""]:
        return self.weight * agreement(scores, load=scores.heard + scores.load)

    def evening(self) -> float:
        return self.weight


class MicroBatchBalance(Balance):
    """The mean over ranks of each rank's own Switch loss: what 2501.11873 compares with.

    Every rank is to use all experts on its own part of a micro-batch, so the loss depends on how
    the batch is shared out, on purpose. Ranks without a token do not count.
    """

    weight: float = 0.01

    def __call__(self, scores: Scores) -> Float[Tensor, ""]:
        tokens = scores.routing.num_tokens
        busy = scores.ranks.sum(scores.tokens.new_full((1,), float(tokens > 0)))
        load = scores.routing.load()
        fraction = (load / load.sum().clamp(min=1)).float()
        mean = scores.probabilities.sum(0) / max(tokens, 1)
        own = self.weight * load.numel() * torch.dot(fraction, mean)
        return own / busy[0].clamp(min=1).float()

    def evening(self) -> float:
        return self.weight
