"""Balance: loss terms that keep experts evenly used and logits small; returned, never stored.

A term is this rank's share (see ``ranks.py``): local sums over global counts. The loss of a step is
the mean over its micro-batches.

Letters: T tokens of this rank, E experts.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor
from moesaic.moe.gate import RouterContext, StatefulRule, RuleState
from moesaic.moe.limit import Limit
from moesaic.moe.ranks import BatchGroup
from moesaic.moe.routing import Routing


@dataclass(frozen=True, slots=True)
class BalanceInputs:
    """What a balance term may look at.

    ``routing`` is as selected, before any limit; ``probabilities`` are the select's own.
    ``load`` (edges per expert) and ``tokens`` are summed over all ranks that share the batch;
    ``heard`` is what earlier micro-batches of the same optimizer step had as ``load``.
    ``gate.state`` is the term's own state. ``ranks`` serve a term that adds up something else.
    """

    router: RouterContext
    routing: Routing
    probabilities: Float[Tensor, "T E"]
    load: Float[Tensor, "E"]
    accumulated_load: Float[Tensor, "E"]
    num_tokens: Float[Tensor, ""]
    batch_group: BatchGroup

    @property
    def logits(self) -> Float[Tensor, "T E"]:
        return self.router.logits

    def zero(self) -> Float[Tensor, ""]:
        """Return the share of a rank that has nothing to say; a gradient may pass through it."""
        return 0.0 * self.router.logits.sum()


class Balance(Choice, StatefulRule):
    """Family of balance terms. ``name`` is its key in ``Record.losses``."""

    name: ClassVar[str] = "balance"

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        """Return this rank's share of the weighted term."""
        raise NotImplementedError

    def selection_bias(self, state: RuleState) -> Float[Tensor, "E"] | None:
        """Return what is added to scores when experts are chosen (never to weights)."""
        del state
        return None

    def balancing_weight(self) -> float:
        """Return the weight with which the loss evens the experts' load; 0 if it does not."""
        return 0.0

    def problems(self, *, experts: int, limit: Limit) -> str | None:
        """Return what the term expects of a layer with so many working experts, if not this."""
        del experts, limit
        return None


class SwitchBalance(Balance):
    """``weight * E * sum_e f_e p_e`` (2101.03961, equations 4 to 6): ``weight`` when balanced.

    f_e is the fraction of edges that chose expert e before any drop, p_e its mean probability.
    """

    weight: float = 0.01

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        return self.weight * load_balance_loss(inputs, load=inputs.load)

    def balancing_weight(self) -> float:
        return self.weight


class RouterZLoss(Balance):
    """``weight * mean over tokens of logsumexp(logits)^2`` (ST-MoE, 2202.08906, equation 5)."""

    name: ClassVar[str] = "z"
    weight: float = 0.001

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        square = inputs.logits.logsumexp(-1).square().sum()
        return self.weight * square / inputs.num_tokens.clamp(min=1).float()


def load_balance_loss(inputs: BalanceInputs, *, load: Float[Tensor, "E"]) -> Float[Tensor, ""]:
    """Return this rank's share of ``E * sum_e f_e p_e``, f being the fractions of ``load``."""
    fraction = (load / load.sum().clamp(min=1)).float()
    mean = inputs.probabilities.sum(0) / inputs.num_tokens.clamp(min=1).float()
    return load.numel() * torch.dot(fraction, mean)
