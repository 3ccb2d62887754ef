"""Correct plans are equal, and each seeded defect is found in its measure."""

import os

import pytest
import torch.distributed as distributed
from defects import DATA, DEFECTS, TENSOR

from head_cases import HEADS
from moesaic.moe.auxiliary_losses import RouterZLoss, SwitchBalance
from moesaic.moe.config import MoE
from moesaic.moe.expert_capacity import Capacity
from moesaic.moe.expert_selection import SwitchTop1
from moesaic.parallel.config import ParallelConfig
from moesaic.testing.tiny_models import tiny_model_config, tiny_run
from moesaic.train.trainer import Trainer
from moesaic.verify.compare_plans import (
    PlanResult,
    VerifySetup,
    compare_plans,
    count_dropped,
    make_setup,
    run_reference,
    summarize,
    to_markdown,
)
from moesaic.verify.shrink_config import shrink_config

CAPPED = MoE(
    experts=4,
    select=SwitchTop1(),
    limit=Capacity(factor=1.0, minimum=1),
    balance=(SwitchBalance(), RouterZLoss()),
)


def given(*, steps: int = 1, timeout_s: float = 60.0) -> VerifySetup:
    run = tiny_run(model=tiny_model_config(moe=CAPPED))
    return make_setup(
        shrink_config(run).run.replace(gradient_accumulation_steps=2),
        steps=steps,
        timeout_s=timeout_s,
    )


def results(*chosen: ParallelConfig, of: VerifySetup) -> list[PlanResult]:
    return list(compare_plans(of, plans=chosen, reference=run_reference(of)))


@pytest.mark.parametrize("head", ["regression", "contrastive", "reward", "denoising"])
def test_two_ranks_equal_one_process_under_any_head(head: str) -> None:
    run = shrink_config(tiny_run(model=HEADS[head])).run
    setup = make_setup(run.replace(gradient_accumulation_steps=2), steps=2, timeout_s=60.0)
    [result] = results(ParallelConfig(plan=DATA), of=setup)  # a rank has no row of some batches
    assert result.equal, result.problems


def test_the_steps_drop_tokens_so_that_capacity_is_tested() -> None:
    lost, edges = count_dropped(run_reference(given()))
    assert 0 < lost < edges


@pytest.mark.parametrize("name", DEFECTS)
def test_a_seeded_defect_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    defect = DEFECTS[name]
    defect.seed(monkeypatch)
    [result] = results(ParallelConfig(plan=defect.plan), of=given())
    measures = [words.split()[0] for words in result.problems]
    assert defect.shows in measures, result.problems


def test_without_a_defect_the_same_plans_are_equal() -> None:
    plans = {defect.plan.to_yaml(): defect.plan for defect in DEFECTS.values()}
    found = results(*(ParallelConfig(plan=plan) for plan in plans.values()), of=given())
    assert [result.problems for result in found] == [()] * len(plans)
    assert summarize(found) == f"{len(plans)} plans of 2 ranks: each equals one process"


def test_a_plan_that_raises_or_dies_is_a_result_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    advance = Trainer.train_step

    def sometimes(self: Trainer) -> object:
        plan = self.run.parallel.plan
        if plan.tensor == 2 and distributed.get_rank():
            raise ValueError("no such tensor | here")
        if plan.expert == 2 and distributed.get_rank():
            os._exit(3)
        return advance(self)

    monkeypatch.setattr(Trainer, "train_step", sometimes)
    plans = [ParallelConfig(plan=p) for p in (TENSOR, DATA.replace(expert=2), DATA)]
    raised, died, right = results(*plans, of=given())
    assert raised.problems == ("failed: rank 1 failed: ValueError: no such tensor | here",)
    assert died.problems == ("failed: rank 1 died with exit code 3",)
    assert right.equal
    assert r"no such tensor \| here" in to_markdown([raised, died, right])
