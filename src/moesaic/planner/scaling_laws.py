"""Scaling laws: loss and best sizes of a compute budget, as the papers print them.

Units: parameters and tokens are counts, budgets are training FLOPs (of all but embeddings), losses
nats a token. A law holds where it was fitted; ``budget_proposal.py`` says where that is.

A law of experts whose constants its paper does not print (2404.02852) is not here.

Letters: N parameters, D tokens, C FLOPs, M FLOPs a token, A share of experts that a token uses, G
granularity, E experts.
"""

import math
from dataclasses import dataclass

FLOPS_PER_PARAMETER = 6.0  # forward and backward, of one token


@dataclass(frozen=True, slots=True)
class ComputeOptimum:
    """How a budget is divided: parameters (or FLOPs a token), and tokens."""

    parameters: float
    tokens: float


@dataclass(frozen=True, slots=True)
class ChinchillaLaw:
    """``L(N, D) = entropy + A / N^alpha + B / D^beta`` (2203.15556, equation 2)."""

    entropy: float
    parameter_scale: float
    parameter_exponent: float
    token_scale: float
    token_exponent: float

    def loss(self, parameters: float, *, tokens: float) -> float:
        """Return the loss of a model of ``parameters`` trained on ``tokens``."""
        by_size = self.parameter_scale / parameters**self.parameter_exponent
        return self.entropy + by_size + self.token_scale / tokens**self.token_exponent

    def optimum(self, flops: float) -> ComputeOptimum:
        """Return the N and D of least loss with ``6 N D = flops`` (equation 4)."""
        alpha, beta = self.parameter_exponent, self.token_exponent
        ratio = alpha * self.parameter_scale / (beta * self.token_scale)
        product = flops / FLOPS_PER_PARAMETER
        parameters = ratio ** (1 / (alpha + beta)) * product ** (beta / (alpha + beta))
        return ComputeOptimum(parameters, product / parameters)


# 2203.15556, equation 10: dense models of 70M to 16B parameters, 5B to 500B tokens
CHINCHILLA = ChinchillaLaw(1.69, 406.4, 0.34, 410.7, 0.28)


@dataclass(frozen=True, slots=True)
class LeverageLaw:
    """How many times less compute an MoE needs than a dense model of its loss (2507.17702).

    ``EL(A, G, C) = Â^(alpha + gamma g^2 + beta g)`` with ``alpha = a + d log10 C``, ``g = log2 G``
    and the saturating ``Â``. The paper does not print the bases of its logarithms: these are the
    ones with which both of its statements hold, a leverage above 7 at (3.1 %, 12, 1e22) and a best
    granularity of around 12.
    """

    a: float = 1.23
    d: float = -7.61e-2
    gamma: float = 1.67e-2
    beta: float = -1.17e-1
    start: float = 1.63e-2
    most: float = 5.28e16

    def leverage(self, active_share: float, *, granularity: float, flops: float) -> float:
        """Return the leverage of experts of which a token uses ``active_share``."""
        g = math.log2(granularity)
        exponent = self.a + self.d * math.log10(flops) + self.gamma * g**2 + self.beta * g
        return self._saturated(active_share) ** exponent

    def best_granularity(self) -> float:
        """Return the granularity of the greatest leverage: ``2 d_model / d_expert``."""
        return 2.0 ** (-self.beta / (2 * self.gamma))

    def _saturated(self, share: float) -> float:
        inverse = 1 / (share + 1 / (1 / self.start - 1 / self.most)) + 1 / self.most
        return 1 / inverse


GREATER_LEVERAGE = LeverageLaw()


def leverage_optimum(flops: float, *, sparse: bool = True) -> ComputeOptimum:
    """Return FLOPs a token / 6 and tokens of a budget: 2507.17702, its fits for MoE and dense."""
    if sparse:
        return ComputeOptimum(0.1915 * flops**0.5095 / FLOPS_PER_PARAMETER, 5.2232 * flops**0.4905)
    return ComputeOptimum(0.0655 * flops**0.5422 / FLOPS_PER_PARAMETER, 15.2582 * flops**0.4578)


def leverage_learning_rate(flops: float) -> float:
    """Return the best peak learning rate of AdamW for a budget (2507.17702)."""
    return 1.1576 * flops**-0.1529


def leverage_batch_tokens(flops: float) -> float:
    """Return the best batch for a budget, in tokens (2507.17702)."""
    return 0.0694 * flops**0.3644


def minicpm_batch_tokens(loss: float) -> float:
    """Return the best batch of a model that reaches ``loss``, in tokens (2404.06395)."""
    return 1.21e9 / loss**6.24


MINICPM_TOKENS_PER_PARAMETER = 192.0  # 2404.06395: compute-optimal, with its WSD schedule


def minicpm_optimum(flops: float) -> ComputeOptimum:
    """Return N and D of a budget at MiniCPM's ratio of tokens to parameters (2404.06395)."""
    parameters = math.sqrt(flops / (FLOPS_PER_PARAMETER * MINICPM_TOKENS_PER_PARAMETER))
    return ComputeOptimum(parameters, MINICPM_TOKENS_PER_PARAMETER * parameters)


def expert_model_parameters(parameters: float, *, experts: int) -> float:
    """Return all parameters of a base of N with E experts in every second layer (2404.02852)."""
    return (1 + (experts - 1) / 3) * parameters
