"""Fit a scaling law of one's own: Chinchilla's form on the runs of a project.

As in 2203.15556 (section 3.3): the Huber loss of ``log L`` is minimised from a grid of starts, with
``log L`` the log-sum-exp of the logs of the three terms. Intervals are of a bootstrap over runs.
The held-out error is of the runs of most compute, under a law of the others.

Letters: P points (runs), S starts, R resamples.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moesaic.core.errors import DataError
from moesaic.core.shapes import Float, Tensor
from moesaic.core.units import counted
from moesaic.planner.budget_proposal import flops_of_run
from moesaic.planner.scaling_laws import ChinchillaLaw

HUBER_DELTA = 1e-3  # of log L, as in the paper
LEAST_RUNS = 6  # one more than the law has constants
_HELD_OUT = 0.2  # share of the runs, those of most compute
_GRID = ((5.0, 15.0), (5.0, 15.0), (0.0,), (0.2, 0.7), (0.2, 0.7))  # a, b, e, alpha, beta
_STEPS, _HALVINGS = 200, 30
_NAMES = ("entropy", "parameter_scale", "parameter_exponent", "token_scale", "token_exponent")


@dataclass(frozen=True, slots=True)
class RunPoint:
    """A run: its active parameters without embeddings, tokens trained on, and held-out loss."""

    name: str
    parameters: float
    tokens: float
    loss: float

    @property
    def flops(self) -> float:
        """Training FLOPs, as ``6 N D``."""
        return flops_of_run(self.parameters, tokens=self.tokens)


@dataclass(frozen=True, slots=True)
class FittedLaw:
    """A law, the 95 % intervals of its constants, and its errors.

    ``held_out_error`` is the mean relative error of the loss of the ``held_out`` runs under a law
    fitted on the others, ``fit_error`` that of all runs under ``law``.
    """

    law: ChinchillaLaw
    intervals: dict[str, tuple[float, float]]
    held_out: tuple[str, ...]
    held_out_error: float
    fit_error: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def fit_law(points: Sequence[RunPoint], *, resamples: int = 100, seed: int = 0) -> FittedLaw:
    """Return the law of ``points``. Raises DataError if they cannot determine one."""
    _require_spread(points)
    law = fit_constants(points)
    ordered = sorted(points, key=lambda point: point.flops)
    cut = min(len(points) - LEAST_RUNS + 1, max(1, round(_HELD_OUT * len(points))))
    seen, held_out = ordered[:-cut], ordered[-cut:]
    drawn = _bootstrap(points, law, resamples=resamples, seed=seed)
    ends = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    intervals = {name: (float(ends[0, i]), float(ends[1, i])) for i, name in enumerate(_NAMES)}
    return FittedLaw(
        law,
        intervals,
        tuple(point.name for point in held_out),
        _mean_error(fit_constants(seen), held_out),
        _mean_error(law, points),
    )


def fit_constants(points: Sequence[RunPoint]) -> ChinchillaLaw:
    """Return the law of least Huber loss over a grid of starts."""
    starts = torch.tensor(list(itertools.product(*_GRID)), dtype=torch.float64)
    weights = torch.ones(len(starts), len(points), dtype=torch.float64)
    values, constants = _minimise(starts, _logs(points), weights=weights)
    return _law_of(constants[values.argmin()])


def _bootstrap(
    points: Sequence[RunPoint], law: ChinchillaLaw, *, resamples: int, seed: int
) -> Float[Tensor, "R 5"]:
    """Return the constants of laws of runs drawn with replacement, in the order of ``_NAMES``."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(points), (resamples, len(points)), generator=generator)
    counts = torch.nn.functional.one_hot(drawn, len(points)).sum(1).double()
    logs = torch.tensor([law.parameter_scale, law.token_scale, law.entropy]).log().tolist()
    start = [*logs, law.parameter_exponent, law.token_exponent]
    starts = torch.tensor([start] * resamples, dtype=torch.float64)
    _, constants = _minimise(starts, _logs(points), weights=counts)
    rows = [[asdict(_law_of(row))[name] for name in _NAMES] for row in constants]
    return torch.tensor(rows, dtype=torch.float64)


def _logs(points: Sequence[RunPoint]) -> Float[Tensor, "P 3"]:
    values = [[point.parameters, point.tokens, point.loss] for point in points]
    return torch.tensor(values, dtype=torch.float64).log()


def _law_of(constants: Float[Tensor, "5"]) -> ChinchillaLaw:
    a, b, e, alpha, beta = constants.tolist()
    return ChinchillaLaw(math.exp(e), math.exp(a), alpha, math.exp(b), beta)


def _minimise(
    constants: Float[Tensor, "S 5"], logs: Float[Tensor, "P 3"], *, weights: Float[Tensor, "S P"]
) -> tuple[Float[Tensor, "S"], Float[Tensor, "S 5"]]:
    """Return the least objectives that BFGS finds from each start, and where: all in step.

    With five constants the whole inverse Hessian is kept, which is what L-BFGS approximates.
    """
    value, gradient = _objective(constants, logs, weights)
    identity = torch.eye(constants.shape[1], dtype=torch.float64)
    inverse = identity.repeat(len(constants), 1, 1)
    moves = torch.ones(len(constants), dtype=torch.bool)
    for _ in range(_STEPS):
        direction = -(inverse @ gradient[:, :, None])[:, :, 0]
        uphill = (direction * gradient).sum(1) >= 0
        direction = torch.where(uphill[:, None], -gradient, direction)
        inverse = torch.where(uphill[:, None, None], identity, inverse)
        step = torch.zeros_like(direction)
        slope = (direction * gradient).sum(1)
        for halving in range(_HALVINGS):  # the first of 1, 1/2, ... that decreases enough (Armijo)
            size = 0.5**halving
            tried, _ = _objective(constants + size * direction, logs, weights)
            open_still = moves & (step == 0).all(1)
            good = open_still & (tried <= value + 1e-4 * size * slope) & (tried < value)
            step = torch.where(good[:, None], size * direction, step)
            if bool((good == open_still).all()):
                break
        moves = (step != 0).any(1)  # a start from where no step decreases has ended
        if not bool(moves.any()):
            break
        new_value, new_gradient = _objective(constants + step, logs, weights)
        inverse = _update_inverse(inverse, step, new_gradient - gradient)
        constants, value, gradient = constants + step, new_value, new_gradient
    return value, constants


def _objective(
    constants: Float[Tensor, "S 5"], logs: Float[Tensor, "P 3"], weights: Float[Tensor, "S P"]
) -> tuple[Float[Tensor, "S"], Float[Tensor, "S 5"]]:
    """Return the Huber losses of ``log L`` over ``HUBER_DELTA``, and their gradients."""
    a, b, e, alpha, beta = (column[:, None] for column in constants.unbind(1))
    by_size, by_tokens = a - alpha * logs[:, 0], b - beta * logs[:, 1]
    terms = torch.stack([by_size, by_tokens, e.expand_as(by_size)])
    error = torch.logsumexp(terms, 0) - logs[:, 2]
    inside = error.clamp(-HUBER_DELTA, HUBER_DELTA)
    huber = inside * (error - inside / 2) / HUBER_DELTA
    share = terms.softmax(0) * weights * inside / HUBER_DELTA
    sizes, tokens, rest = share.unbind(0)
    columns = (sizes, tokens, rest, -sizes * logs[:, 0], -tokens * logs[:, 1])
    return (weights * huber).sum(1), torch.stack([column.sum(1) for column in columns], 1)


def _update_inverse(
    inverse: Float[Tensor, "S 5 5"], step: Float[Tensor, "S 5"], change: Float[Tensor, "S 5"]
) -> Float[Tensor, "S 5 5"]:
    """Return the inverse Hessians after a step (BFGS); the same where nothing curves upward."""
    curvature = (step * change).sum(1)
    curved = curvature > 1e-12
    rho = torch.where(curved, 1 / curvature.where(curved, 1.0), 0.0)[:, None, None]
    identity = torch.eye(step.shape[1], dtype=torch.float64)
    left = identity - rho * step[:, :, None] * change[:, None, :]
    updated = left @ inverse @ left.transpose(1, 2) + rho * step[:, :, None] * step[:, None, :]
    return torch.where(curved[:, None, None], updated, inverse)


def _mean_error(law: ChinchillaLaw, points: Sequence[RunPoint]) -> float:
    errors = [abs(law.loss(p.parameters, tokens=p.tokens) / p.loss - 1) for p in points]
    return sum(errors) / len(errors)


def _require_spread(points: Sequence[RunPoint]) -> None:
    if len(points) < LEAST_RUNS:
        raise DataError(
            f"found {counted(len(points), 'run')} with a validation loss, expected "
            f"at least {LEAST_RUNS}: the law has five constants"
        )
    for name, values in (
        ("parameters", {point.parameters for point in points}),
        ("tokens", {point.tokens for point in points}),
    ):
        if len(values) < 3:
            raise DataError(
                f"the runs have {len(values)} different numbers of {name}, expected at least 3: "
                "train models of other sizes, and for other numbers of steps"
            )
