"""Pipeline schedules have the idle time (bubble) of the closed forms in their papers."""

from pathlib import Path

import pytest

from moesaic.parallel.pipeline_schedules import (
    BreadthFirst,
    DualPipeV,
    GPipe,
    Interleaved,
    InterleavedZeroBubble,
    OneForwardOneBackward,
    PipelineSchedule,
    ZeroBubbleV,
)
from parallel.schedule_timeline import simulate_schedule

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "pipeline.md"
SIZES = ((2, 8), (4, 8), (4, 32), (8, 32))
ROWS = (
    GPipe(),
    OneForwardOneBackward(),
    Interleaved(),
    Interleaved(stages=4),
    BreadthFirst(),
    InterleavedZeroBubble(),
    ZeroBubbleV(),
    DualPipeV(),
)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("schedule", ROWS, ids=repr)
def test_idle_time_is_that_of_the_closed_form(
    schedule: PipelineSchedule, size: tuple[int, int]
) -> None:
    ranks, micro_batches = size
    if schedule.problems(ranks=ranks, micro_batches=micro_batches):
        pytest.skip("not possible")
    work = micro_batches * schedule.stages_per_rank() * (3 if schedule.splits_backward else 1)
    idle = simulate_schedule(schedule, ranks=ranks, micro_batches=micro_batches).idle
    assert idle == pytest.approx((ranks - 1) / (work + ranks - 1))


def test_one_forward_one_backward_keeps_a_micro_batch_per_stage_and_gpipe_all() -> None:
    kept = [
        simulate_schedule(s, ranks=4, micro_batches=32).peak_micro_batches
        for s in (GPipe(), OneForwardOneBackward())
    ]
    assert kept == [32, 4]


def test_the_table_in_the_guide_is_that_of_the_simulation() -> None:
    assert table() in PAGE.read_text(encoding="utf-8"), f"expected in {PAGE.name}:\n{table()}"


def table() -> str:
    """Idle share of the ranks' time, and micro-batches kept, for several sizes."""
    heads = [f"{ranks} ranks, {number}" for ranks, number in SIZES]
    lines = [f"| schedule | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for schedule in ROWS:
        cells = [_cell(schedule, *size) for size in SIZES]
        lines.append(f"| `{_name(schedule)}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _name(schedule: PipelineSchedule) -> str:
    usual = schedule == type(schedule)()
    return type(schedule).__name__ if usual else f"{type(schedule).__name__}(stages=4)"


def _cell(schedule: PipelineSchedule, ranks: int, micro_batches: int) -> str:
    found = simulate_schedule(schedule, ranks=ranks, micro_batches=micro_batches)
    return f"{100 * found.idle:.1f} %, {found.peak_micro_batches:g}"
