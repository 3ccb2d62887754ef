"""The requirements of a schedule are those of PyTorch's class."""

import pytest
from torch.distributed import pipelining
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

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

ALL = (
    GPipe(),
    OneForwardOneBackward(),
    Interleaved(),
    Interleaved(stages=3),
    BreadthFirst(),
    InterleavedZeroBubble(),
    ZeroBubbleV(),
    DualPipeV(),
)


def _ops(schedule: PipelineSchedule, *, ranks: int, micro_batches: int) -> list[list[object]]:
    torch_class = getattr(pipelining, schedule.torch_name)
    return get_schedule_ops(torch_class, ranks, micro_batches, schedule.stages_per_rank())


def _of(op: object) -> list[object]:
    """An operation, or the overlapped ones in it."""
    return list(getattr(op, "sub_actions", None) or [op]) if op is not None else []


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_each_rank_runs_its_own_stages(schedule: PipelineSchedule) -> None:
    for rank, ops in enumerate(_ops(schedule, ranks=3, micro_batches=6)):
        ran = {part.stage_index for op in ops for part in _of(op)}
        assert ran == {s for s, owner in enumerate(schedule.rank_of_stage(3)) if owner == rank}


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_only_zero_bubble_schedules_split_the_backward(schedule: PipelineSchedule) -> None:
    ops = _ops(schedule, ranks=2, micro_batches=4)
    kinds = {part.computation_type.name for rank in ops for op in rank for part in _of(op)}
    assert ("BACKWARD_WEIGHT" in kinds) == schedule.splits_backward


@pytest.mark.parametrize("schedule", ALL[2:], ids=repr)
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 2), (2, 4), (2, 5), (3, 6), (4, 9)])
def test_whole_passes_are_those_of_torch_without_gradients_of_weights(
    schedule: PipelineSchedule, ranks: int, micro_batches: int
) -> None:
    if schedule.problems(ranks=ranks, micro_batches=micro_batches):
        return
    for rank, ops in enumerate(_ops(schedule, ranks=ranks, micro_batches=micro_batches)):
        own = [s for s, owner in enumerate(schedule.rank_of_stage(ranks)) if owner == rank]
        parts = [part for op in ops for part in _of(op)]
        assert schedule.whole_passes(ranks=ranks, rank=rank, micro_batches=micro_batches) == tuple(
            (own.index(part.stage_index), "BACKWARD" in part.computation_type.name)
            for part in parts
            if part.computation_type.name != "BACKWARD_WEIGHT"
        )


@pytest.mark.parametrize("schedule", ALL[2:], ids=repr)
@pytest.mark.parametrize("micro_batches", range(1, 10))
def test_what_is_refused_is_what_torch_refuses(
    schedule: PipelineSchedule, micro_batches: int
) -> None:
    refused = schedule.problems(ranks=3, micro_batches=micro_batches)
    if refused is None:
        assert _ops(schedule, ranks=3, micro_batches=micro_batches)
    else:
        with pytest.raises(ValueError, match=r"micro-?batches"):
            _ops(schedule, ranks=3, micro_batches=micro_batches)


def test_1f1b_needs_a_micro_batch_per_stage() -> None:
    schedule = OneForwardOneBackward()
    assert schedule.problems(ranks=4, micro_batches=4) is None
    why = schedule.problems(ranks=4, micro_batches=3)
    assert why == "at least as many micro-batches as stages, 4, not 3"


def test_a_schedule_is_read_from_a_string() -> None:
    assert PipelineSchedule._validate_choice("Interleaved(stages=3)") == Interleaved(stages=3)
