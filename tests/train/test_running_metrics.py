"""Running metrics: means by category, equal over ranks and over a restart."""

import pytest
import torch

from moesaic.core.errors import CheckpointError
from moesaic.data.batch import IGNORE_LABEL, TARGET_LANGUAGE, TASK, Batch
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess
from moesaic.testing.tiny_models import LABELS, LANGUAGES, TASKS, random_batch
from moesaic.train.running_metrics import EventLog, LossCategories, RunningMetrics, StepSums

CATEGORIES = LossCategories(LABELS)


def rows_of_loss(batch: Batch) -> torch.Tensor:
    return (batch.labels != IGNORE_LABEL).nonzero()[:, 0]


def _by_category(loss: torch.Tensor, batch: Batch) -> torch.Tensor:
    return CATEGORIES.sums(loss[None], row=rows_of_loss(batch), batch=batch)


def _sums(seed: int) -> StepSums:
    batch = random_batch(6, seed=seed)
    loss = torch.arange(batch.num_predicted, dtype=torch.float32)
    terms = {"cross_entropy": torch.tensor(float(seed)), "loss_z": torch.tensor(0.5)}
    return StepSums(_by_category(loss, batch), terms, batch.num_tokens)


def test_sums_by_category_are_those_of_a_loop() -> None:
    batch = random_batch(6, seed=3)
    loss = torch.rand(batch.num_predicted)
    expected = torch.zeros(2, 5, dtype=torch.float64)
    left = iter(loss.double())
    for row in range(6):
        for token in batch.labels[row]:
            if token != IGNORE_LABEL:
                value = next(left)
                for column in (batch.groups[TASK][row], 2 + batch.groups[TARGET_LANGUAGE][row]):
                    expected[:, column] += torch.tensor([value, 1.0])
    torch.testing.assert_close(_by_category(loss, batch), expected)


def test_the_sums_do_not_depend_on_the_order_of_losses() -> None:
    batch = random_batch(6, seed=3)
    loss, row = torch.rand(batch.num_predicted), rows_of_loss(batch)
    order = torch.randperm(len(row))
    torch.testing.assert_close(
        CATEGORIES.sums(loss[None, order], row=row[order], batch=batch),
        CATEGORIES.sums(loss[None], row=row, batch=batch),
    )


def test_a_row_is_the_mean_since_the_last_row() -> None:
    meters, world = RunningMetrics(CATEGORIES, device=torch.device("cpu")), SingleProcess()
    for seed in (1, 2):
        meters.add_step(_sums(seed), norm=float(seed))
    row = meters.compute_and_reset(world)
    both = _sums(1).add(_sums(2))
    total, count = both.losses[:, :2].sum(1).tolist()
    assert row["train/loss"] == pytest.approx(total / count)
    assert row["train/loss/translation"] == pytest.approx(
        float(both.losses[0, 0] / both.losses[1, 0])
    )
    assert row["train/cross_entropy"] == 1.5
    assert row["train/loss_z"] == 0.5
    assert row["train/grad_norm"] == 1.5
    assert row["tokens"] == row["train/tokens"] == both.tokens
    meters.add_step(_sums(5), norm=5.0)
    later = meters.compute_and_reset(world)
    assert later["train/grad_norm"] == 5.0
    assert later["tokens"] == _sums(5).tokens
    assert later["train/tokens"] == both.tokens + _sums(5).tokens


def test_a_category_without_tokens_has_no_value() -> None:
    meters = RunningMetrics(
        LossCategories({TASK: TASKS, TARGET_LANGUAGE: (*LANGUAGES, "xho_Latn")}),
        device=torch.device("cpu"),
    )
    meters.add_losses(torch.ones(2, 6) * torch.tensor([1, 1, 1, 1, 1, 0]))
    assert "valid/loss/xho_Latn" not in meters.mean_losses(SingleProcess(), prefix="valid")
    assert (
        RunningMetrics(CATEGORIES, device=torch.device("cpu")).mean_losses(
            SingleProcess(), prefix="x"
        )
        == {}
    )


def _saved_and_restored() -> dict[str, float]:
    world, device = ProcessGroupWorld(), torch.device("cpu")
    meters, again = (
        RunningMetrics(CATEGORIES, device=device),
        RunningMetrics(CATEGORIES, device=device),
    )
    meters.add_step(_sums(1 + world.rank), norm=2.0)
    again.restore(meters.tensors(world), world=world)
    again.add_step(_sums(3 + world.rank), norm=4.0)
    return again.compute_and_reset(world)


def test_a_restart_between_rows_changes_no_row() -> None:
    meters = RunningMetrics(CATEGORIES, device=torch.device("cpu"))
    for first, second, norm in ((1, 2, 2.0), (3, 4, 4.0)):
        meters.add_step(_sums(first).add(_sums(second)), norm=norm)
    expected = meters.compute_and_reset(SingleProcess())
    for row in run_on_ranks(2, _saved_and_restored):
        assert row == pytest.approx(expected)


@pytest.mark.parametrize(
    "best", [[], {}, {"loss": "x", "step": 1}, {"loss": 1.0, "step": -1}, {"loss": 1.0}]
)
def test_saved_events_out_of_range_are_refused(best) -> None:
    with pytest.raises(CheckpointError, match="the saved events"):
        EventLog().restore({"best": best})
