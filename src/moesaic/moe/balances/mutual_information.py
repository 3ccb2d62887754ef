"""MutualInformation: experts evenly used over all tokens, each token sure of a few.

Letters: T tokens of this rank, E experts.
"""

from typing import ClassVar

from pydantic import Field

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.balance import Balance, BalanceInputs


class MutualInformationBalance(Balance):
    """``weight * (mean over tokens of H(e | x) - H(e))``, natural logs (DS-MoE, 2404.05567).

    Minus the mutual information of tokens and experts: between ``-weight * log E`` and 0. H(e) is
    the entropy of the mean probabilities m of the whole batch, over all ranks. A rank's share of
    ``-H(e) = sum_e m_e log m_e`` is the same sum with its own part of m before the logarithm, which
    is a constant: probabilities sum to one, so the logarithm's own gradient is zero, and both
    values and gradients of the shares add up to those of the batch.
    """

    name: ClassVar[str] = "mutual_information"
    weight: float = Field(default=0.0005, ge=0)

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        tokens = inputs.num_tokens.clamp(min=1).float()
        p = inputs.probabilities
        mean = inputs.batch_group.sum(p.detach().double().sum(0)).float() / tokens
        # one sum: the difference of two large ones would be rounded away
        return self.weight * (p * (_clamped_log(mean) - _clamped_log(p))).sum() / tokens

    def balancing_weight(self) -> float:
        return self.weight


def _clamped_log(p: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """Natural logarithm, large and finite at zero (0 log 0 is 0)."""
    return p.clamp(min=1e-30).log()
