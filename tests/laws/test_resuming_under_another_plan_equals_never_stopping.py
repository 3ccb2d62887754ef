"""Law: a run resumed under another plan, on other ranks, equals one that never stopped."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from mixer_cases import in_sequence, names_allowed_by
from moesaic.checkpoint.full_checkpoint import load_checkpoint
from moesaic.core.shapes import Tensor
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess, World
from moesaic.moe.auxiliary_losses import SwitchBalance
from moesaic.moe.config import MoE
from moesaic.moe.expert_bias import BiasUpdate
from moesaic.moe.expert_capacity import Capacity
from moesaic.moe.expert_selection import TopK
from moesaic.optim.optimizer import AdamW
from moesaic.parallel.config import ParallelConfig
from moesaic.testing.tiny_models import tiny_model_config, tiny_run, tiny_trainer
from moesaic.train.loop import training_loop
from moesaic.train.run import Run
from moesaic.train.training_hooks import CheckpointHook

STEPS, HALF = 4, 2  # moments of two steps are saved, and what they give is used in a second one
STATEFUL = MoE(
    experts=4,
    select=TopK(k=2),
    limit=Capacity(factor=1.0, minimum=1),
    balance=(SwitchBalance(), BiasUpdate()),
)
PLANS = {
    "expert, tensor and zero": {"expert": 4, "tensor": 2, "zero": 2},
    "zero 3": {"zero": 3, "expert": 2},
    "sliced experts": {"expert": 2, "expert_tensor": 2, "zero": 1},
    "pipe and expert": {"pipe": 2, "expert": 2},
    "pipe and zero": {"pipe": 2, "zero": 3},
    "data": {},
}
SPLIT = names_allowed_by(tiny_model_config(), ParallelPlan(data=1, tensor=2))
MODEL = in_sequence(tiny_model_config(moe=STATEFUL), SPLIT)  # every mixer that all plans allow
Weights = dict[str, Tensor]


def _run(plan: dict[str, int]) -> Run:
    return tiny_run(
        steps=STEPS,
        gradient_accumulation_steps=2,
        model=MODEL,
        optimizer=AdamW(lr=1e-3, eps=1e-4),  # a tiny gradient must not decide a whole step's sign
        parallel=ParallelConfig(plan=ParallelPlan(**plan)),
    )


def _train(plan: dict[str, int], folder: Path, until: int, resume: Path | None) -> None:
    world: World = ProcessGroupWorld() if torch.distributed.is_initialized() else SingleProcess()
    trainer = tiny_trainer(_run(plan), world=world)
    if resume is not None:
        trainer.load_checkpoint(resume)
    training_loop(trainer, hooks=[CheckpointHook(folder, flush=lambda: None)], until=until)


def _weights(folder: Path, *, step: int) -> Weights:
    snapshot = load_checkpoint(folder / f"step-{step:08d}")
    optimizer = snapshot.files["optimizer"].items()
    return {**snapshot.files["model"], **{f"optimizer/{n}": t for n, t in optimizer}}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    folder = tmp_path_factory.mktemp("uninterrupted")
    _train({}, folder, STEPS, None)
    return _weights(folder, step=STEPS)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint that four ranks leave under a plan, written once."""

    @cache
    def checkpoint(plan: str) -> Path:
        folder = tmp_path_factory.mktemp("stopped")
        run_on_ranks(4, _train, PLANS[plan], folder, HALF, None)
        return folder / f"step-{HALF:08d}"

    return checkpoint


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("expert, tensor and zero", "zero 3"),
        ("zero 3", "data"),
        ("data", "sliced experts"),
        ("sliced experts", "expert, tensor and zero"),
        ("pipe and expert", "zero 3"),
        ("zero 3", "pipe and zero"),
    ],
)
def test_resuming_under_another_plan_equals_never_stopping(
    first: str, then: str, uninterrupted: Weights, stopped: Callable[[str], Path], tmp_path: Path
) -> None:
    ranks = 4 if "tensor" in then or "pipe" in then else 2
    run_on_ranks(ranks, _train, PLANS[then] | _fit(then, ranks), tmp_path, STEPS, stopped(first))
    found = _weights(tmp_path, step=STEPS)
    assert found.keys() == uninterrupted.keys()
    for name, value in uninterrupted.items():
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-5, msg=name)


def _fit(plan: str, ranks: int) -> dict[str, int]:
    """Two ranks cannot hold slices of two halves of the experts."""
    return {"expert": 1} if plan == "sliced experts" and ranks == 2 else {}
