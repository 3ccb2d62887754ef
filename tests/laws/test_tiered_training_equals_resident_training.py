"""Law: training with tensors on any memory tier equals training on the device, bit for bit.

Loss, gradient norm, parameters and optimizer states, with clipping, accumulation of two
micro-batches, on one and two ranks; and so does a run that is resumed into another tier.
``benchmarks/tiered_training.py`` runs the same cells for 50 steps.
"""

import errno
import os
from collections import Counter
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import patch

import pytest

from moesaic.checkpoint.checkpoint_directory import RetentionPolicy
from moesaic.checkpoint.sharded_checkpoint import CheckpointSaver, copy_to_host
from moesaic.checkpoint.snapshot import RankSnapshot
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.memory.disk_store import DiskFullError, DiskStore
from moesaic.model.parameter_flop_count import BatchDims
from moesaic.optim.gradients import TieredGradients
from moesaic.parallel.activation_checkpointing import (
    CheckpointBlocks,
    CheckpointBranches,
    CheckpointCheapOperations,
)
from moesaic.parallel.precision import BFloat16, Float32, Precision
from moesaic.planner.cost_entries import DEVICE, DISK, HOST, Purpose
from moesaic.planner.cost_settings import CostSettings
from moesaic.planner.step_cost import step_cost
from moesaic.train.loop import training_loop
from moesaic.train.run import Run
from moesaic.train.training_hooks import CheckpointHook
from tier_cells import PLANS, RESIDENT, TIERS, resume_in, run_of, train, trainer_of

STEPS = 2
TIERS_OF_PLAN = {
    "one process": tuple(name for name in TIERS if not name.startswith(("late", "ahead"))),
    "data": ("host", "gradients on host, states on disk", "all away"),
    "experts without copies": ("host", "disk", "all away"),
    "ZeRO 2, experts without copies": ("host", "disk", "all away"),
    "ZeRO 3, experts without copies": ("weights on disk",),  # dense slices from peers
    "tensor": ("host", "disk", "weights on disk"),
    "pipeline": ("host", "disk", "all away"),
}


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


def _stopped_by_a_full_disk(folder: Path) -> tuple[str, list[str]]:
    """Save after step 1; then the copy that an update needs beside the saved one has no room."""
    trainer = trainer_of("data", TIERS["disk"])
    trainer.train_step()
    kept = trainer.snapshot()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    hook = CheckpointHook(folder, flush=lambda: None)
    rank_is_full = patch.object(
        os, "posix_fallocate", full if trainer.world.rank else lambda *_: None
    )
    with rank_is_full, pytest.raises(DiskFullError) as error:
        training_loop(trainer, hooks=[hook], until=STEPS)
    assert kept.step == trainer.step == 1
    resident = train(trainer_of("data", RESIDENT), steps=STEPS)
    other = trainer_of("data", TIERS["host"])
    other.load_checkpoint(folder / "step-00000001")
    found = train(other, steps=STEPS - 1).differences(resident)
    return str(error.value), [name for name in found if name != "metrics"]


def test_a_full_disk_stops_all_ranks_with_a_checkpoint_that_resumes(tmp_path: Path) -> None:
    first, second = run_on_ranks(2, _stopped_by_a_full_disk, tmp_path)
    assert "another rank" in first[0]
    assert "rank1-optimizer-states-0" in second[0]
    assert first[1] == second[1] == []


def _forecast_moves(run: Run, *, ranks: int, rank: int) -> Counter[tuple[str, str, Purpose]]:
    settings = CostSettings(
        model=run.model,
        parallel=run.parallel,
        optimizer=run.optimizer,
        sizes=BatchDims(rows=1, source=4, target=4),
        micro_batches=run.gradient_accumulation_steps,
        world=ranks,
        device="cpu",
        precision=run.precision,
    )
    cost = step_cost(settings, rank=rank)
    return Counter({(m.source, m.target, m.purpose): m.bytes for m in cost.moved})


@pytest.mark.parametrize(
    ("plan", "accumulation", "precision"),
    [
        ("one process", 1, Float32()),
        ("one process", 1, BFloat16()),
        ("one process, Muon", 2, Float32()),
        ("data", 3, Float32()),
        ("pipeline", 2, Float32()),
        ("one process, 8-bit", 1, Float32()),
        ("ZeRO 1", 3, Float32()),
        ("ZeRO 2, experts without copies", 3, BFloat16()),
    ],
)
def test_the_bytes_between_tiers_are_those_of_the_forecast(
    plan: str, accumulation: int, precision: Precision
) -> None:
    changes = {"gradient_accumulation_steps": accumulation, "precision": precision}

    def moved() -> tuple[int, ...]:
        trainer = trainer_of(plan, TIERS["disk"], **changes)
        trainer.train_step()
        gradients, tier = trainer.parallel_model.gradients, trainer.optimizer.tier
        assert isinstance(gradients, TieredGradients)
        assert tier is not None
        assert isinstance(tier.store, DiskStore)
        # groups of Muon are fetched whole, and so are two rows whose states are above the bound
        if "Muon" not in plan and precision == Float32():
            assert 0 < tier.store.peak_in_flight <= TIERS["disk"].in_flight_bytes
        weights = trainer.optimizer.updated_weights.moved
        counts = (gradients.store.moved, tier.store.moved, weights)
        return gradients.left.written, *(n for each in counts for n in (each.fetched, each.written))

    ranks, run = PLANS[plan][0], run_of(plan, TIERS["disk"], **changes)
    for rank, found in enumerate(run_on_ranks(ranks, moved)):
        forecast = _forecast_moves(run, ranks=ranks, rank=rank)
        gradients, states, weights = Purpose.GRADIENTS, Purpose.STATES, Purpose.WEIGHTS
        expected = [forecast[DEVICE, HOST, gradients] - forecast[HOST, DEVICE, gradients] // 2]
        for purpose in (gradients, states):  # where they are read is up to the rule of the update
            for way in ((DISK, HOST), (HOST, DISK)):
                expected.append(forecast[*way, purpose])
            expected[-2] += forecast[DISK, DEVICE, purpose]
            expected[-1] += forecast[DEVICE, DISK, purpose]
        expected += [forecast[DEVICE, HOST, weights], forecast[HOST, DEVICE, weights]]
        if plan == "pipeline":  # the sum over stages reads once, and writes once
            assert list(found[1:]) == expected[1:]
        else:
            assert list(found) == expected


def _resumed_differences(plan: str, tiers: tuple[str, str], folder: Path) -> list[str]:
    resident = train(trainer_of(plan, RESIDENT), steps=STEPS)
    first, second = (trainer_of(plan, TIERS[tier]) for tier in tiers)
    resume_in(first, second, folder, step=STEPS - 1)
    resumed = train(second, steps=1)
    return [name for name in resumed.differences(resident) if name != "metrics"]


@pytest.mark.parametrize(
    ("plan", "tiers"),
    [
        ("one process", ("weights on disk", "all away")),
        ("ZeRO 3, Muon", ("disk", "gradients on host")),
        ("experts without copies", ("states on host", "disk")),
        ("ZeRO 3, 8-bit", ("disk", "gradients on host")),
    ],
)
def test_a_run_resumed_into_another_tier_equals_resident_training(
    plan: str, tiers: tuple[str, str], tmp_path: Path
) -> None:
    for found in run_on_ranks(PLANS[plan][0], _resumed_differences, plan, tiers, tmp_path):
        assert found == []


def _saved_while_steps_go_on(plan: str, tier: str, folder: Path) -> tuple[list[str], bool]:
    """Write a checkpoint of step 1 after step 3 has changed everything, and resume from it."""
    trainer, later = trainer_of(plan, TIERS[tier]), Event()
    write = CheckpointSaver._write

    def write_later(*given: Any) -> Path:
        later.wait()
        return write(*given)

    trainer.train_step()
    saver = CheckpointSaver(folder, world=trainer.world)
    with patch.object(CheckpointSaver, "_write", write_later):
        snapshot = trainer.snapshot()
        assert isinstance(snapshot, RankSnapshot)
        held = snapshot.files["optimizer"], copy_to_host(snapshot)["optimizer"]
        in_place = all(held[0][name] is held[1][name] for _, name in snapshot.frozen)
        saver.save_async(snapshot, retention=RetentionPolicy())
        del snapshot, held
        trainer.train_step()
        trainer.train_step()
        later.set()
        saver.close()
    other = trainer_of(plan, RESIDENT)
    other.load_checkpoint(folder / "step-00000001")
    found = train(other, steps=1).differences(train(trainer_of(plan, RESIDENT), steps=2))
    return [name for name in found if name != "metrics"], in_place


@pytest.mark.parametrize("tier", ["disk", "all away"])
def test_a_checkpoint_that_is_written_while_steps_go_on_is_that_of_its_step(
    tier: str, tmp_path: Path
) -> None:
    plan = "experts without copies"
    for found, in_place in run_on_ranks(2, _saved_while_steps_go_on, plan, tier, tmp_path):
        assert found == []
        assert in_place  # states of a tier are not copied into memory


CHECKPOINTED = [
    CheckpointBlocks(),
    CheckpointBranches(branches=("mixer", "moe")),
    CheckpointCheapOperations(),
]


def _differences_when_checkpointed(plan: str, tier: str) -> list[list[str]]:
    resident = train(trainer_of(plan, RESIDENT), steps=STEPS)
    parallel = run_of(plan, TIERS[tier]).parallel
    runs = [parallel.replace(activation_checkpointing=each) for each in CHECKPOINTED]
    trainers = [trainer_of(plan, TIERS[tier], parallel=each) for each in runs]
    return [train(trainer, steps=STEPS).differences(resident) for trainer in trainers]


def test_activations_that_are_recomputed_or_offloaded_change_nothing_on_a_tier() -> None:
    plan = "ZeRO 3, experts without copies"
    for found in run_on_ranks(2, _differences_when_checkpointed, plan, "late, all away"):
        assert found == [[]] * len(CHECKPOINTED)
