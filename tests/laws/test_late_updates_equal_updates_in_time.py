"""Law: experts without tokens that are updated late get the bits of an update in every step.

AdamW and Muon, with clipping, accumulation, one and two ranks, from a checkpoint taken while
experts are late and resumed into another tier; and the bytes that move are those of the experts
that had tokens.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest

from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.optim.gradients import TieredGradients
from moesaic.train.trainer import Trainer
from tier_cells import DISK, EXPERTS, HOST, PLANS, RESIDENT, TIERS, resume_in, train, trainer_of

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
        ("one process, 8-bit", "late on disk", "late on host"),
    ],
)
def test_late_updates_equal_updates_in_time(
    plan: str, first: str, then: str, tmp_path: Path
) -> None:
    ranks = PLANS[plan][0]
    for missed, found in run_on_ranks(ranks, _differences, plan, first, then, tmp_path):
        assert missed
        assert found == []


@dataclass
class _Bank:
    """What the closed form knows of the experts of a layer: how many updates each has missed."""

    states: list[int]
    weights: list[int]

    def step(self, *, used: set[int], touched: set[int], max_steps: int) -> tuple[int, int]:
        """Return how many experts are updated, and how many weights are before they are used."""
        brought_up = sum(self.weights[expert] > 0 for expert in used)
        due = touched | {e for e, missed in enumerate(self.states) if missed == max_steps}
        for expert in range(EXPERTS):
            self.states[expert] = 0 if expert in due else self.states[expert] + 1
            late = expert not in due
            self.weights[expert] = late * (1 + self.weights[expert] * (expert not in used))
        return len(due), brought_up


def test_only_experts_with_tokens_move_gradients_and_states(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = MemoryPlan(gradients=HOST, optimizer_states=DISK, late_steps=2)
    trainer = trainer_of("one process", memory, gradient_accumulation_steps=1)
    gradients, tier = trainer.parallel_model.gradients, trainer.optimizer.tier
    assert isinstance(gradients, TieredGradients)
    assert tier is not None
    banks, touched = trainer.optimizer.late.banks, dict[str, set[int]]()
    update = trainer.optimizer.step

    def step() -> None:
        touched.update((n, set(gradients.touched(bank.parameter))) for n, bank in banks.items())
        update()

    monkeypatch.setattr(trainer.optimizer, "step", step)
    dense = 4 * sum(p.numel() for n, p in trainer.model.named_parameters() if n not in banks)
    expected = {name: _Bank([0] * EXPERTS, [0] * EXPERTS) for name in banks}
    left = updated = read_before_use = 0
    for _ in range(STEPS):
        records = {r.layer: r.routing for r in trainer.train_step().result.records}
        left, updated = left + dense, updated + dense
        for name, bank in banks.items():
            size = 4 * bank.parameter[0].numel()
            used = set(records[".".join(name.split(".")[:2])].expert.tolist()) - {EXPERTS}
            assert touched[name] <= used  # a token without a loss has a gradient of zero
            due, brought_up = expected[name].step(used=used, touched=touched[name], max_steps=2)
            left += size * len(touched[name])
            updated, read_before_use = updated + size * due, read_before_use + size * brought_up
    assert gradients.left.written == left
    assert tier.store.moved.written == 2 * updated
    assert tier.store.moved.fetched == 2 * (updated + read_before_use)
    assert updated < STEPS * 4 * sum(p.numel() for p in trainer.model.parameters())
