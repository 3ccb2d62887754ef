"""Law: copies beside a device are in order: training with them has the bits of resident training.

A device that runs each copy as late as it may finds no memory released, changed or read before its
copy is done; bytes under way stay within their bound.
"""

import pytest
from fake_device import FakeDevice

from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.model.parameter_flop_count import BatchDims
from moesaic.optim.gradients import TieredGradients
from moesaic.optim.master_weights import Float32Master, MasterWeights, StochasticRounding
from moesaic.parallel.precision import BFloat16
from moesaic.planner.cost_entries import DEVICE, HOST
from moesaic.planner.cost_settings import CostSettings
from moesaic.planner.step_cost import step_cost
from tier_cells import PLANS, RESIDENT, TIERS, run_of, train, trainer_of

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


@pytest.mark.parametrize("masters", [Float32Master(), StochasticRounding()])
def test_narrow_weights_are_rounded_as_without_a_device(masters: MasterWeights) -> None:
    changes = {"precision": BFloat16(master=masters)}
    # gradients of narrow weights are added up in float32 on a tier, so resident ones differ
    plain = train(trainer_of("one process", TIERS["host"], **changes), steps=STEPS)
    memory = TIERS["host"].replace(in_flight_bytes=1_000)  # which splits large parameters
    with FakeDevice().used() as device:
        outcome = train(trainer_of("one process", memory, **changes), steps=STEPS)
    assert outcome.differences(plain) + device.problems == []


def test_buffers_take_at_most_the_bytes_of_the_forecast() -> None:
    memory = TIERS["host"].replace(in_flight_bytes=50_000)
    run = run_of("one process", memory)
    with FakeDevice().used():
        trainer = trainer_of("one process", memory)
        trainer.train_step()
    settings = CostSettings(
        model=run.model, parallel=run.parallel, sizes=BatchDims(rows=1, source=4, target=4)
    )
    on_gpu, on_cpu = (step_cost(settings.replace(device=kind)) for kind in ("cuda", "cpu"))
    gradients, weights = trainer.parallel_model.gradients, trainer.optimizer.weights.copies
    assert isinstance(gradients, TieredGradients)
    assert gradients._ring
    assert gradients.store.copies
    assert weights
    more = on_gpu.held_bytes(tier=HOST) - on_cpu.held_bytes(tier=HOST)
    sent, updated = gradients.store.copies.to_host, weights.copies.to_host
    assert gradients._ring.num_bytes + updated.peak_bytes <= more
    assert sent.peak_bytes <= on_gpu.peak[DEVICE] - on_cpu.peak[DEVICE]
