"""EntropyBalance: routers that are sure of themselves, so that few experts pass a threshold.

Letters: T tokens, E experts.
"""

from typing import ClassVar

import torch

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.balance import Balance, BalanceInputs


class EntropyBalance(Balance):
    """``weight * mean over tokens of the probabilities' entropy``: top-p's dynamic loss.

    Harder tasks need more experts (2403.07652): without it a top-p router spreads its mass and
    takes ever more experts. It evens nothing.
    """

    name: ClassVar[str] = "entropy"
    weight: float = 0.0001

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        p = inputs.probabilities
        log = p.clamp(min=torch.finfo(p.dtype).tiny).log()
        return -self.weight * (p * log).sum() / inputs.num_tokens.clamp(min=1).float()
