"""Law: train 20 equals train 10, save, load, train 10: bit for bit, whatever the run does."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mixer_cases import hybrid
from moe.variants import balanced
from moesaic.checkpoint.full_checkpoint import load_checkpoint, save_checkpoint
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.world import ProcessGroupWorld
from moesaic.model.block_layout import ParallelResidual
from moesaic.moe.adaptive_auxiliary_losses import NullBalance
from moesaic.moe.attention_experts import MixtureOfAttention
from moesaic.moe.auxiliary_losses import SwitchBalance
from moesaic.moe.config import MoE
from moesaic.moe.dispatch_projection import DownProjection
from moesaic.moe.expert_capacity import Capacity, RandomPriority
from moesaic.moe.expert_selection import NullTopK, TopK
from moesaic.moe.experts import LoRAExpert
from moesaic.moe.null_experts import ZeroExperts
from moesaic.moe.product_key_memory import ProductKeyMemory
from moesaic.moe.router_noise import StochasticWarmup
from moesaic.moe.shared_experts import ResidualExpert
from moesaic.optim.optimizer import Muon
from moesaic.testing.tiny_models import tiny_model_config, tiny_run, tiny_trainer
from moesaic.train.run import Run
from moesaic.train.trainer import Trainer

RANDOM_TOKENS = MoE(
    experts=4,
    select=TopK(k=2),
    limit=Capacity(factor=1.0, minimum=1, priority=RandomPriority()),
    balance=(SwitchBalance(),),
)
ANNEALED = MoE(
    experts=3,
    select=NullTopK(k=2),
    null_experts=ZeroExperts(number=2),
    balance=(NullBalance(decay_steps=15),),
    noise=StochasticWarmup(warmup_steps=15),
)
VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {"optimizer": Muon()},
    "accumulated": {"gradient_accumulation_steps": 2},
    "all-bodies": {
        "model": tiny_model_config(
            moe=RANDOM_TOKENS.replace(
                expert=LoRAExpert(rank=2),
                shared_experts=ResidualExpert(),
                dispatch_projection=DownProjection(ratio=0.5),
            )
        ),
        "optimizer": Muon(),
    },
    "attention-experts-in-parallel": {
        "model": tiny_model_config().replace(
            mixers={"attention": MixtureOfAttention()}, block_layout=ParallelResidual()
        )
    },
    "sequence-mixers": {"model": hybrid(tiny_model_config()).replace(dropout=0.1)},
    "memory": {"model": tiny_model_config(moe=ProductKeyMemory(keys_per_side=4, slots=3))},
    "dropout-and-random-drops": {
        "model": tiny_model_config(moe=RANDOM_TOKENS).replace(dropout=0.1)
    },
    "annealed-nulls-and-warm-up": {"model": tiny_model_config(moe=ANNEALED)},
    "bias-update": {
        "gradient_accumulation_steps": 2,
        "model": tiny_model_config(moe=balanced("bias-and-sequence")),
    },
    "adaptive-balance": {"model": tiny_model_config(moe=balanced("adaptive"))},
}


STEPS = {"adamw": 20, "annealed-nulls-and-warm-up": 20}  # what is annealed ends at step 15


def _rows(trainer: Trainer, *, steps: int) -> list[dict[str, float]]:
    rows = []
    for _ in range(steps):
        trainer.train_step()
        if trainer.step % 4 == 0:  # the stops at 6 and 10 fall between two rows
            rows.append(trainer.metrics.compute_and_reset(trainer.world))
    return rows


def _same(left: Trainer, right: Trainer) -> None:
    one, other = left.snapshot(), right.snapshot()
    assert one.state == other.state
    for name, tensors in one.files.items():
        assert tensors.keys() == other.files[name].keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, other.files[name][key]), f"{name}: {key}"


def _resumed(run: Run, folder: Path, *, half: int) -> tuple[Trainer, list[dict[str, float]]]:
    first = tiny_trainer(run)
    rows = _rows(first, steps=half)
    save_checkpoint(folder, first.snapshot())
    second = tiny_trainer(run)
    torch.rand(3)  # whatever happened in the new process must not matter
    second.restore(load_checkpoint(folder))
    return second, rows + _rows(second, steps=half)


@pytest.mark.parametrize("variant", VARIANTS)
def test_resuming_equals_never_stopping(variant: str, tmp_path: Path) -> None:
    run, steps = tiny_run(**VARIANTS[variant]), STEPS.get(variant, 12)
    whole = tiny_trainer(run)
    whole_rows = _rows(whole, steps=steps)
    resumed, rows = _resumed(run, tmp_path, half=steps // 2)
    assert rows == whole_rows
    _same(resumed, whole)


def _on_two(folder: Path, stop: bool) -> list[dict[str, float]]:
    run, world = tiny_run(**VARIANTS["dropout-and-random-drops"]), ProcessGroupWorld()
    trainer = tiny_trainer(run, world=world)
    rows = _rows(trainer, steps=6)
    if stop:
        snapshot = trainer.snapshot()
        if world.rank == 0:
            save_checkpoint(folder, snapshot)
        world.barrier()
        trainer = tiny_trainer(run, world=world)
        trainer.restore(load_checkpoint(folder))
    return rows + _rows(trainer, steps=6)


def test_resuming_equals_never_stopping_on_two_ranks(tmp_path: Path) -> None:
    whole = run_on_ranks(2, _on_two, tmp_path, False)
    assert run_on_ranks(2, _on_two, tmp_path, True) == whole


def test_a_run_resumes_with_another_number_of_ranks(tmp_path: Path) -> None:
    run = tiny_run(**VARIANTS["dropout-and-random-drops"])
    whole = tiny_trainer(run)
    whole_rows = _rows(whole, steps=12)
    first = tiny_trainer(run)
    rows = _rows(first, steps=6)
    save_checkpoint(tmp_path, first.snapshot())
    rest = run_on_ranks(2, _continued, tmp_path)[0]
    for row, here in zip(rows + rest, whole_rows, strict=True):
        assert row == pytest.approx(here, rel=1e-4)


def _continued(folder: Path) -> list[dict[str, float]]:
    run = tiny_run(**VARIANTS["dropout-and-random-drops"])
    trainer = tiny_trainer(run, world=ProcessGroupWorld())
    trainer.restore(load_checkpoint(folder))
    return _rows(trainer, steps=6)
