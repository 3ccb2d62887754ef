"""Plan search: the fastest plans of a space that fit, by branch and bound, with a certificate.

Degrees are opened in the order of a time that none of their plans is under. The search ends when
the next bound is above the slowest plan that it keeps, so nothing in the space beats what it keeps
under the model's forecasts: pruning drops only what cannot win. Where nothing fits, every plan's
bytes have been compared, and the nearest plan is that which exceeds its limits least.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from moesaic.core.units import show_bytes
from moesaic.planner.cost_entries import TIER_WORDS
from moesaic.planner.plan_forecast import Limits, PlanForecast, tier_sums
from moesaic.planner.plan_model import PlanModel
from moesaic.planner.plan_space import CompletePlan, Degrees, Option


@dataclass(frozen=True, slots=True)
class NearestPlan:
    """The plan that exceeds its limits least: ``needed`` bytes of a tier of ``allowed``."""

    choice: CompletePlan
    tier: str
    needed: float
    allowed: float

    def __str__(self) -> str:
        missing = show_bytes(self.needed - self.allowed)
        return (
            f"it needs {show_bytes(self.needed)} of {TIER_WORDS[self.tier]} memory per rank, has "
            f"{show_bytes(self.allowed)}: {missing} are missing"
        )


@dataclass(frozen=True, slots=True)
class Certificate:
    """Why nothing beats the plans: every degree that was not opened has a bound above ``slowest``.

    ``degrees`` were in the space, ``opened`` were searched; the others' least bound is
    ``next_bound`` seconds (None: all were opened). ``evaluations`` counts forecasts of whole plans.
    """

    degrees: int
    plans: int
    opened: int
    evaluations: int
    slowest: float
    next_bound: float | None

    @property
    def holds(self) -> bool:
        """Whether no plan that was left out can be faster than one that is kept."""
        return self.next_bound is None or self.next_bound >= self.slowest


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The fastest plans that fit, fastest first; none: ``nearest`` says what is missing."""

    best: tuple[PlanForecast, ...]
    nearest: NearestPlan | None
    certificate: Certificate


@dataclass(slots=True)
class _Kept:
    """The fastest forecasts so far, at most ``size``; and the nearest plan that does not fit."""

    size: int
    heap: list[tuple[float, int, PlanForecast]] = field(default_factory=list)
    nearest: NearestPlan | None = None
    seen: int = 0

    @property
    def slowest(self) -> float:
        """The time that a plan must be under to be kept."""
        return -self.heap[0][0] if len(self.heap) == self.size else float("inf")

    def offer(self, found: PlanForecast) -> None:
        self.seen += 1
        entry = (-found.time.total, -self.seen, found)
        if len(self.heap) < self.size:
            heapq.heappush(self.heap, entry)
        elif found.time.total < self.slowest:
            heapq.heapreplace(self.heap, entry)

    def offer_nearest(self, choice: CompletePlan, held: dict[str, int], limits: Limits) -> None:
        ratio, tier = limits.excess(held)
        allowed = limits.bytes.get(tier, 0)
        near = self.nearest
        if near is None or ratio < near.needed / max(1.0, near.allowed):
            self.nearest = NearestPlan(choice, tier, held[tier], allowed)


def search(
    model: PlanModel,
    *,
    limits: Limits,
    keep: int = 5,
    legal: Callable[[Degrees], bool] = lambda _: True,
    trains: Callable[[CompletePlan], bool] = lambda _: True,
) -> SearchResult:
    """Return the ``keep`` fastest plans that fit, each of other degrees, and the certificate.

    ``legal`` is asked once for each degrees that are opened: whether the model can be cut so.
    ``trains`` is whether what is trained can be under a plan.
    """
    space = list(model.space.degrees(model.settings.inventory.config))
    options = model.space.options()
    queue = [(model.bound_seconds(degrees), degrees) for degrees in space]
    heapq.heapify(queue)
    kept, opened, before = _Kept(keep), 0, model.evaluations
    while queue and queue[0][0] < kept.slowest:  # an infinite bound is never under it
        _, degrees = heapq.heappop(queue)
        if legal(degrees):
            opened += 1
            _open(degrees, options, model=model, limits=limits, kept=kept, trains=trains)
    best = tuple(found for _, _, found in sorted(kept.heap, reverse=True))
    return SearchResult(
        best,
        None if best else kept.nearest,
        Certificate(
            degrees=len(space),
            plans=len(space) * len(options),
            opened=opened,
            evaluations=model.evaluations - before,
            slowest=kept.slowest,
            next_bound=queue[0][0] if queue and queue[0][0] < math.inf else None,
        ),
    )


def _open(
    degrees: Degrees,
    options: Sequence[Option],
    *,
    model: PlanModel,
    limits: Limits,
    kept: _Kept,
    trains: Callable[[CompletePlan], bool],
) -> None:
    """Offer the fastest option of some degrees that fits; if nothing has yet, the nearest."""
    fits: list[PlanForecast] = []
    slower = {
        each
        for each in (False, True)
        if model.bound_seconds(degrees, recomputes=each) >= kept.slowest
    }
    for option in _distinct(options, degrees):
        if option.recomputes in slower:
            continue
        choice, held = CompletePlan(degrees, option), tier_sums(model.held(degrees, option))
        is_small = limits.excess(held)[0] <= 1
        if (kept.heap and not is_small) or not trains(choice):
            continue
        if is_small:
            fits.append(model.forecast(choice))
        else:
            kept.offer_nearest(choice, held, limits)
    if fits:
        kept.offer(min(fits, key=lambda found: found.time.total))


def _distinct(options: Sequence[Option], degrees: Degrees) -> Iterable[Option]:
    """Yield the options, of one ZeRO stage where there are no replicas to shard over."""
    alone = degrees.data * degrees.context == 1
    first = min((option.zero for option in options), default=0)
    return (option for option in options if not alone or option.zero == first)
