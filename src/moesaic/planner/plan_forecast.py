"""Plan forecast: the time and the bytes of a plan, and the bytes that a rank may hold."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from moesaic.planner.cost_entries import DEVICE, Purpose
from moesaic.planner.plan_space import CompletePlan
from moesaic.planner.step_time import StepTime


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes of each tier that one rank may hold; a tier that is not named has none."""

    bytes: Mapping[str, float]

    def excess(self, held: Mapping[str, float]) -> tuple[float, str]:
        """Return the largest ratio of held to allowed bytes, and its tier."""
        ratios = ((b / max(1.0, self.bytes.get(tier, 0)), tier) for tier, b in held.items() if b)
        return max(ratios, default=(0.0, DEVICE))


@dataclass(frozen=True, slots=True)
class PlanForecast:
    """Seconds of a step, and bytes of a rank by (tier, purpose)."""

    choice: CompletePlan
    time: StepTime
    held: Mapping[tuple[str, Purpose], int]

    @property
    def by_tier(self) -> dict[str, int]:
        """Bytes of each tier."""
        return tier_sums(self.held)


def tier_sums(held: Mapping[tuple[str, Purpose], int]) -> dict[str, int]:
    """Return the bytes of each tier."""
    sums: Counter[str] = Counter()
    for (tier, _), size in held.items():
        sums[tier] += size
    return dict(sums)
