"""Law: training with gradients and states on a memory tier equals training on the device, bitwise.

Loss, gradient norm, parameters and optimizer states, with clipping, accumulation of two
micro-batches, on one and two ranks; and so does a run that is resumed into another tier.
``benchmarks/tiered_training.py`` runs the same cells for 50 steps.
"""

from pathlib import Path

import pytest

from moesaic.distributed.forked_ranks import run_on_ranks
from tier_cells import PLANS, RESIDENT, TIERS, resume_in, train, trainer_of

STEPS = 2
TIERS_OF_PLAN = {"one process": tuple(TIERS), "data": ("host", "gradients on host, states on disk")}


def _differences(plan: str) -> dict[str, list[str]]:
    """Train under each memory plan, and resident; return what differs, by memory plan."""
    resident = train(trainer_of(plan, RESIDENT), steps=STEPS)
    return {
        tier: train(trainer_of(plan, TIERS[tier]), steps=STEPS).differences(resident)
        for tier in TIERS_OF_PLAN.get(plan, ("host", "disk"))
    }


@pytest.mark.parametrize("plan", PLANS)
def test_tiered_training_equals_resident_training(plan: str) -> None:
    for found in run_on_ranks(PLANS[plan][0], _differences, plan):
        assert found == {tier: [] for tier in found}


def _resumed_differences(plan: str, tiers: tuple[str, str], folder: Path) -> list[str]:
    resident = train(trainer_of(plan, RESIDENT), steps=STEPS)
    first, second = (trainer_of(plan, TIERS[tier]) for tier in tiers)
    resume_in(first, second, folder, step=STEPS - 1)
    resumed = train(second, steps=1)
    return [name for name in resumed.differences(resident) if name != "metrics"]


@pytest.mark.parametrize(
    ("plan", "tiers"),
    [
        ("one process", ("host", "disk")),
        ("ZeRO 3, Muon", ("disk", "gradients on host")),
        ("experts without copies", ("states on host", "disk")),
    ],
)
def test_a_run_resumed_into_another_tier_equals_resident_training(
    plan: str, tiers: tuple[str, str], tmp_path: Path
) -> None:
    for found in run_on_ranks(PLANS[plan][0], _resumed_differences, plan, tiers, tmp_path):
        assert found == []
