"""Law: experts without tokens that are updated late get the bits of an update in every step.

AdamW and Muon, with clipping, accumulation, one and two ranks, from a checkpoint taken while
experts are late and resumed into another tier; and the bytes that move are those of the experts
that had tokens.
"""

from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from moesaic.core.errors import ConfigError
from moesaic.core.shapes import Tensor
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.world import local_tensor
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.model.config import Stack
from moesaic.optim.gradients import TieredGradients
from moesaic.optim.master_weights import StochasticRounding
from moesaic.optim.optimizer import Muon
from moesaic.parallel.low_rank_adaptation import LoRA
from moesaic.parallel.precision import BFloat16
from moesaic.testing.tiny_models import random_batch, tiny_model_config
from moesaic.train.trainer import Trainer
from tier_cells import DISK, HOST, MODEL, PLANS, RESIDENT, TIERS, resume_in, train, trainer_of

STEPS = 5


def _most_missed(trainer: Trainer) -> int:
    return max(max(bank.missed) for bank in trainer.optimizer.late.banks.values())


def _differences(plan: str, first: str, then: str, folder: Path) -> tuple[int, list[str]]:
    resident = train(trainer_of(plan, RESIDENT), steps=STEPS)
    trainer, other = (trainer_of(plan, TIERS[tier]) for tier in (first, then))
    trainer.train_step()
    trainer.train_step()
    missed = _most_missed(trainer)
    resume_in(trainer, other, folder, step=3)
    resumed = train(other, steps=STEPS - 3)
    assert resumed.metrics[1:] == resident.metrics[4:]  # the row before has sums of the first run
    return missed, [name for name in resumed.differences(resident) if name != "metrics"]


@pytest.mark.parametrize(
    ("plan", "first", "then"),
    [
        ("one process", "late on host", "late on disk"),
        ("one process, Muon", "late on disk", "states on host"),
        ("data", "late on disk", "late on host"),
        ("experts without copies", "late, all away", "late on disk"),
        ("ZeRO 1", "late on host", "late on disk"),
        ("ZeRO 3, Muon", "late on disk", "late on host"),
        ("ZeRO 3, 8-bit", "late on disk", "late on host"),
    ],
)
def test_late_updates_equal_updates_in_time(
    plan: str, first: str, then: str, tmp_path: Path
) -> None:
    ranks = PLANS[plan][0]
    for missed, found in run_on_ranks(ranks, _differences, plan, first, then, tmp_path):
        assert missed
        assert found == []


def test_weights_of_late_experts_are_rounded_from_their_masters() -> None:
    in_time, late = (
        train(trainer_of("one process", TIERS[tier], precision=BFloat16()), steps=STEPS)
        for tier in ("host", "late on host")
    )
    assert late.differences(in_time) == []


def _differences_with_few_experts() -> list[str]:
    """Train a model of 4 experts on 3 ranks: the last has none of a shard."""
    few = {"model": tiny_model_config(), "gradient_accumulation_steps": 1}
    tiers = (RESIDENT, TIERS["late on host"])
    resident, late = (train(trainer_of("ZeRO 3, Muon", t, **few), steps=STEPS) for t in tiers)
    return late.differences(resident)


def test_a_rank_without_experts_updates_as_the_others() -> None:
    assert run_on_ranks(3, _differences_with_few_experts) == [[]] * 3


@dataclass
class _Bank:
    """What the closed form knows of the experts of a layer: how many updates each has missed."""

    states: list[int]
    weights: list[int]

    def step(self, *, used: set[int], touched: set[int], max_steps: int) -> tuple[int, int]:
        """Return how many experts are updated, and how many weights are before they are used."""
        brought_up = sum(self.weights[expert] > 0 for expert in used)
        due = touched | {e for e, missed in enumerate(self.states) if missed == max_steps}
        for expert in range(len(self.states)):
            self.states[expert] = 0 if expert in due else self.states[expert] + 1
            late = expert not in due
            self.weights[expert] = late * (1 + self.weights[expert] * (expert not in used))
        return len(due), brought_up


def _moved_and_expected(plan: str) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return the bytes of gradients that left, and of states written and read: counted, by form."""
    memory = MemoryPlan(gradients=HOST, optimizer_states=DISK, late_steps=2)
    trainer = trainer_of(plan, memory, gradient_accumulation_steps=1)
    gradients, tier = trainer.parallel_model.gradients, trainer.optimizer.tier
    assert isinstance(gradients, TieredGradients)
    assert tier is not None
    banks, touched = trainer.optimizer.late.banks, dict[str, set[int]]()
    sizes = {n: 4 * local_tensor(p).numel() for n, p in trainer.model.named_parameters()}
    experts = {n: _experts_of(trainer, n) for n in banks}
    update = trainer.optimizer.step

    def step() -> None:
        touched.update((n, set(gradients.touched(bank.parameter))) for n, bank in banks.items())
        update()

    dense = sum(size for name, size in sizes.items() if name not in banks)
    expected = {name: _Bank([0] * len(each), [0] * len(each)) for name, each in experts.items()}
    left = updated = read_before_use = 0
    for _ in range(STEPS):
        with patch.object(trainer.optimizer, "step", step):
            records = {r.layer: r.routing for r in trainer.train_step().result.records}
        left, updated = left + dense, updated + dense
        for name, numbers in experts.items():
            size = sizes[name] // len(numbers)
            rows = trainer.world.all_reduce(records[".".join(name.split(".")[:2])].load())
            used = {own for own, number in enumerate(numbers) if rows[number]}
            assert touched[name] <= used  # a token without a loss has a gradient of zero
            due, brought_up = expected[name].step(used=used, touched=touched[name], max_steps=2)
            left += size * len(touched[name])
            updated, read_before_use = updated + size * due, read_before_use + size * brought_up
    assert updated < STEPS * sum(sizes.values())
    moved = gradients.left.written, tier.store.moved.written, tier.store.moved.fetched
    return moved, (left, 2 * updated, 2 * (updated + read_before_use))


def _experts_of(trainer: Trainer, name: str) -> range:
    ((first, number),) = trainer.parallel_model.local_spans(name)[0]
    return range(first, first + number)


@pytest.mark.parametrize("plan", ["one process", "ZeRO 1"])
def test_only_experts_with_tokens_move_gradients_and_states(plan: str) -> None:
    for moved, expected in run_on_ranks(PLANS[plan][0], _moved_and_expected, plan):
        assert moved == expected


def _validation_losses(plan: str, tier: str) -> list[Tensor]:
    """Return the losses of passes without gradients, which use an expert after another."""
    trainer, losses = trainer_of(plan, TIERS[tier]), []
    for _ in range(3):
        trainer.train_step()
    for seed in range(8):
        batch = random_batch(1, seed=seed)
        losses.append(trainer.objective.losses(trainer.parallel_model, batch=batch))
    return losses


def test_weights_that_stay_gathered_are_not_late() -> None:
    for late, in_time in zip(
        *(run_on_ranks(2, _validation_losses, "ZeRO 1", t) for t in ("late on host", "host")),
        strict=True,
    ):
        assert all(map(torch.equal, late, in_time))


def test_late_steps_without_effect_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"late_steps=2 with .*=DeviceMemory"):
        MemoryPlan(late_steps=2)
    late = TIERS["late on host"]
    dense = MODEL.replace(encoder=Stack(layers=0), decoder=Stack(layers=1, moe_every=0))
    with pytest.raises(ConfigError, match="late_steps=8: this model has no MoE layers"):
        trainer_of("one process", late, model=dense)
    with pytest.raises(ConfigError, match="none of them is trained"):
        trainer_of("one process", late, trainable=LoRA())
    with pytest.raises(ConfigError, match="StochasticRounding rounds by"):
        trainer_of("one process", late, precision=BFloat16(master=StochasticRounding()))
    run_on_ranks(2, _refused_copies, late)


def _refused_copies(late: MemoryPlan) -> None:
    with pytest.raises(ConfigError, match="2 ranks share the update of each matrix of muon/expert"):
        trainer_of("data", late, optimizer=Muon())
