"""Law: updates that run ahead of the gradient norm and are rolled back equal updates after it.

Bit for bit, with gradient spikes and gradients that are not finite put in, accumulation, one and
two ranks, AdamW and the AdamW part of Muon, and resumed into another tier.
"""

import math
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from moesaic.core.errors import ConfigError
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.model.parameter_flop_count import BatchDims
from moesaic.model.transformer import Transformer
from moesaic.optim import run_ahead
from moesaic.parallel.parallelize import check_parallel
from moesaic.planner.cost_entries import Purpose
from moesaic.planner.cost_settings import CostSettings
from moesaic.planner.step_cost import step_cost
from moesaic.train.trainer import Trainer
from tier_cells import MODEL, PLANS, RESIDENT, TIERS, resume_in, run_of, train, trainer_of

STEPS, CLIP = 4, 1.02  # the first norm is 1.025, later ones are less
# the factors on a gradient in calls of backward, two in an attempt at a step
SPIKES = {2: 1e4, 5: math.nan}


class _AtOnce(Executor):
    """Runs an update before backward goes on, so that every one has run when the norm is known."""

    def submit(self, function: Any, /, *args: Any, **named: Any) -> "Future[Any]":
        done: Future[Any] = Future()
        done.set_result(function(*args, **named))
        return done


def _trainer(plan: str, memory: MemoryPlan) -> Trainer:
    trainer, calls = trainer_of(plan, memory, clip_norm=CLIP), iter(range(1000))
    weight = trainer.model.embedding.weight
    weight.register_hook(lambda grad: grad * SPIKES.get(next(calls), 1.0))
    return trainer


def _differences(plan: str, tier: str, then: str, folder: Path) -> tuple[list[str], int, set[bool]]:
    """Return what differs, how many parameters ran ahead, and whether steps were rolled back."""
    resident = train(_trainer(plan, RESIDENT), steps=STEPS)
    with patch.object(run_ahead, "ThreadPoolExecutor", lambda *_, **__: _AtOnce()):
        trainer = _trainer(plan, TIERS[tier])
    ahead, rolled_back = 0, set[bool]()
    stop, step = trainer.run_ahead.stop, trainer.train_step

    def stop_and_count() -> None:
        nonlocal ahead
        stop()
        ahead = max(ahead, len(trainer.optimizer.updated))

    def step_and_note() -> Any:
        report = step()
        rolled_back.add(report.rolled_back)
        return report

    other = trainer_of(plan, TIERS[then], clip_norm=CLIP)
    with (
        patch.object(trainer.run_ahead, "stop", stop_and_count),
        patch.object(trainer, "train_step", step_and_note),
    ):
        resume_in(trainer, other, folder, step=STEPS - 1)
    found = train(other, steps=1).differences(resident)
    return [name for name in found if name != "metrics"], ahead, rolled_back


@pytest.mark.parametrize(
    ("plan", "tier", "then"),
    [
        ("one process", "ahead on disk", "ahead on host"),
        ("one process", "ahead, late, all away", "host"),
        ("one process, Muon", "ahead on host", "ahead on disk"),
        ("data", "ahead on host", "ahead, late, all away"),
        ("ZeRO 3, Muon", "ahead on host", "host"),
        ("one process, 8-bit", "ahead on disk", "ahead, late, all away"),
    ],
)
def test_updates_ahead_of_the_norm_equal_updates_after_it(
    plan: str, tier: str, then: str, tmp_path: Path
) -> None:
    for found, ahead, rolled_back in run_on_ranks(
        PLANS[plan][0], _differences, plan, tier, then, tmp_path
    ):
        assert found == []
        assert ahead > 1
        assert rolled_back == {True, False}


def test_updates_that_could_not_run_ahead_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"run_ahead_bytes=1 with optimizer_states=DeviceMemory"):
        MemoryPlan(run_ahead_bytes=1)
    parallel = run_of("pipeline", TIERS["ahead on host"]).parallel
    with pytest.raises(ConfigError, match=r"run_ahead_bytes=\d+ with parallel.plan.pipe=2"):
        check_parallel(Transformer.without_values(MODEL), parallel=parallel, plan=parallel.plan)


@pytest.mark.parametrize(
    ("plan", "tier"),
    [
        ("one process, Muon", "ahead on host"),
        ("one process, Muon", "ahead on disk"),
        ("one process, 8-bit", "ahead on host"),
    ],
)
def test_the_memory_of_old_values_is_that_of_the_forecast(plan: str, tier: str) -> None:
    run = run_of(plan, TIERS[tier])
    settings = CostSettings(
        model=run.model,
        parallel=run.parallel,
        optimizer=run.optimizer,
        sizes=BatchDims(rows=1, source=4, target=4),
        device="cpu",
    )
    held = trainer_of(plan, TIERS[tier]).run_ahead.num_bytes
    assert step_cost(settings).held_bytes(purpose=Purpose.OVERWRITTEN) == held
