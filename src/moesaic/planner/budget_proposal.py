"""Budget proposal: what to train with a number of FLOPs; each value with its paper and range."""

from dataclasses import asdict, dataclass
from typing import Any

from moesaic.core.errors import UserError
from moesaic.planner.scaling_laws import (
    CHINCHILLA,
    FLOPS_PER_PARAMETER,
    GREATER_LEVERAGE,
    expert_model_parameters,
    leverage_batch_tokens,
    leverage_learning_rate,
    leverage_optimum,
    minicpm_batch_tokens,
    minicpm_optimum,
)

ACTIVE_EXPERTS, EXPERTS = 12, 384  # of Ling-mini-beta (2507.17702): 3.1 % of the experts
ATTENTION_SHARE = 0.35  # of a token's FLOPs: 30 to 40 % is best, 20 to 50 % nearly so (2507.17702)
_FEW = 8
_LEVERAGE = "2507.17702"
_OF_LEVERAGE = "models of 8 x 384 to 22 x 1280 (layers x width), MoE with one shared expert"
_OF_CHINCHILLA = "dense, 70M to 16B parameters, 5B to 500B tokens"
_OF_MINICPM = "dense, small models with a WSD schedule"
_LEAST, _MOST = 1e15, 1e27  # far beyond what was fitted, a law has no meaning


@dataclass(frozen=True, slots=True)
class ProposedValue:
    """A value with its unit, the arXiv number it is from, and what was measured there."""

    name: str
    value: float
    unit: str
    paper: str
    fitted_on: str


@dataclass(frozen=True, slots=True)
class BudgetProposal:
    """What to train with ``flops``: an MoE, and dense models to compare it with."""

    flops: float
    values: tuple[ProposedValue, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"flops": self.flops, "values": [asdict(value) for value in self.values]}


def propose_for_budget(flops: float) -> BudgetProposal:
    """Return sizes, tokens, learning rate and batch for ``flops`` training FLOPs.

    Raises UserError for a budget that no law can say anything about.
    """
    if not _LEAST <= flops <= _MOST:
        raise UserError(
            f"--budget {flops:g}: expected training FLOPs from {_LEAST:g} to {_MOST:g}, e.g. 1e21 "
            "(the laws were fitted on runs of about 1e18 to 1e21)"
        )
    return BudgetProposal(flops, (*_expert_model(flops), *_dense_models(flops)))


def _expert_model(flops: float) -> tuple[ProposedValue, ...]:
    best = leverage_optimum(flops)
    share, granularity = ACTIVE_EXPERTS / EXPERTS, GREATER_LEVERAGE.best_granularity()
    leverage = GREATER_LEVERAGE.leverage(share, granularity=granularity, flops=flops)
    whole = best.parameters * (ATTENTION_SHARE + (1 - ATTENTION_SHARE) / share)
    rows = (
        ("active parameters (FLOPs a token / 6)", best.parameters, "parameters"),
        ("tokens", best.tokens, "tokens"),
        ("experts", EXPERTS, "experts of a layer"),
        ("experts of a token", ACTIVE_EXPERTS, "experts, beside one shared"),
        ("granularity", granularity, "2 x model dim / expert dim"),
        ("all parameters, if attention has 35 % of a token's FLOPs", whole, "parameters"),
        ("learning rate", leverage_learning_rate(flops), "peak, AdamW"),
        ("batch", leverage_batch_tokens(flops), "tokens"),
        ("compute of a dense model of this loss", leverage * flops, "FLOPs"),
    )
    return tuple(ProposedValue(*row, _LEVERAGE, _OF_LEVERAGE) for row in rows)


def _dense_models(flops: float) -> tuple[ProposedValue, ...]:
    dense, small = CHINCHILLA.optimum(flops), minicpm_optimum(flops)
    loss = CHINCHILLA.loss(dense.parameters, tokens=dense.tokens)
    chinchilla = ("2203.15556", _OF_CHINCHILLA)
    minicpm = ("2404.06395", _OF_MINICPM)
    return (
        ProposedValue("dense: parameters", dense.parameters, "parameters", *chinchilla),
        ProposedValue("dense: tokens", dense.tokens, "tokens", *chinchilla),
        ProposedValue("dense: loss, of its own data", loss, "nats a token", *chinchilla),
        ProposedValue(
            f"{_FEW} experts in every second layer of it: all parameters",
            expert_model_parameters(dense.parameters, experts=_FEW),
            "parameters",
            "2404.02852",
            "bases of 100M to 730M; 4 and 8 experts are the best to serve",
        ),
        ProposedValue("dense, small: parameters", small.parameters, "parameters", *minicpm),
        ProposedValue("dense, small: tokens", small.tokens, "tokens", *minicpm),
        ProposedValue("dense: batch at that loss", minicpm_batch_tokens(loss), "tokens", *minicpm),
    )


def flops_of_run(active_parameters: float, *, tokens: float) -> float:
    """Return the training FLOPs of a run, attention scores left out: ``6 N D``."""
    return FLOPS_PER_PARAMETER * active_parameters * tokens
