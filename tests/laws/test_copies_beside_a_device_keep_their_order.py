"""Law: copies beside a device are in order: training with them has the bits of resident training.

A device that runs each copy as late as it may finds no memory released, changed or read before its
copy is done; bytes under way stay within their bound.
"""

import pytest
from fake_device import FakeDevice

from moesaic.distributed.forked_ranks import run_on_ranks
from tier_cells import PLANS, RESIDENT, TIERS, train, trainer_of

STEPS = 2
CELLS = {
    "one process": ("host", "disk", "states on host", "gradients on host", "ahead, late, all away"),
    "one process, Muon": ("host", "late, all away"),
    "data": ("host", "all away"),
    "ZeRO 2, experts without copies": ("host",),
    "pipeline": ("all away",),
}


def _differences(plan: str) -> dict[str, list[str]]:
    resident, found = train(trainer_of(plan, RESIDENT), steps=STEPS), {}
    for tier in CELLS[plan]:
        # as small as a plan may say, so that copies have to make room
        memory = TIERS[tier].replace(in_flight_bytes=10_000)
        with FakeDevice().used() as device:
            outcome = train(trainer_of(plan, memory), steps=STEPS)
        found[tier] = outcome.differences(resident) + device.problems[:1]
        if not device.copies:
            found[tier].append("nothing was copied")
    return found


@pytest.mark.parametrize("plan", CELLS)
def test_training_beside_a_device_equals_resident_training(plan: str) -> None:
    for found in run_on_ranks(PLANS[plan][0], _differences, plan):
        assert found == {tier: [] for tier in CELLS[plan]}
