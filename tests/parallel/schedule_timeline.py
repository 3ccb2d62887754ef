"""Simulates a pipeline schedule from PyTorch's lists of operations: idle time and activations kept.

A forward, a backward for inputs and a backward for weights take one unit each of a rank's time
(the assumption of 2401.10241), divided by its number of stages; sending takes none.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed import pipelining
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from moesaic.parallel.pipeline_schedules import PipelineSchedule

UNITS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}


@dataclass(frozen=True, slots=True)
class ScheduleTimeline:
    """``idle`` is the bubble, the share of all ranks' time in which they wait.

    ``peak_micro_batches`` are those whose activations the fullest rank keeps at once.
    """

    idle: float
    peak_micro_batches: float


@dataclass(frozen=True, slots=True)
class _Operation:
    kind: str
    stage: int
    micro_batch: int


def simulate_schedule(
    schedule: PipelineSchedule, *, ranks: int, micro_batches: int
) -> ScheduleTimeline:
    """Simulate a schedule, without processes."""
    torch_class = getattr(pipelining, schedule.torch_name)
    listed = get_schedule_ops(torch_class, ranks, micro_batches, schedule.stages_per_rank())
    waiting = [list(_operations(actions)) for actions in listed]
    unit, stages = 1.0 / schedule.stages_per_rank(), ranks * schedule.stages_per_rank()
    kept = max(_peak_micro_batches(ops) for ops in waiting) * unit
    done: dict[_Operation, float] = {}
    clock, busy = [0.0] * ranks, 0.0
    while any(waiting):
        moved = False
        for rank, ops in enumerate(waiting):
            while ops and (ready := _ready_time(ops[0], done=done, stages=stages)) is not None:
                moved, op = True, ops.pop(0)
                cost = UNITS[op.kind] * unit
                clock[rank] = done[op] = max(clock[rank], ready) + cost
                busy += cost
        if not moved:
            raise RuntimeError(f"{type(schedule).__name__} has a deadlock: {waiting}")
    return ScheduleTimeline(1 - busy / (ranks * max(clock)), kept)


def _operations(actions: Sequence[Any]) -> Iterator[_Operation]:
    forwards: Counter[int] = Counter()
    for action in actions:
        for part in (action.sub_actions or (action,)) if action is not None else ():
            kind, stage = part.computation_type.value, part.stage_index
            if kind == "F":
                # counted here: torch 2.13 lists those of the last stage of 1F1B from 1
                yield _Operation(kind, stage, forwards[stage])
                forwards[stage] += 1
            elif kind in UNITS:
                yield _Operation(kind, stage, part.microbatch_index)


def _ready_time(op: _Operation, *, done: dict[_Operation, float], stages: int) -> float | None:
    """Return when the inputs of an operation are ready; None while they are not."""
    needed: list[list[_Operation]] = []
    if op.kind == "F" and op.stage:
        needed.append([_Operation("F", op.stage - 1, op.micro_batch)])
    if op.kind in "BI":
        needed.append([_Operation("F", op.stage, op.micro_batch)])
        if op.stage + 1 < stages:
            needed.append([_Operation(kind, op.stage + 1, op.micro_batch) for kind in "BI"])
    if op.kind == "W":
        needed.append([_Operation("I", op.stage, op.micro_batch)])
    times = [[done[each] for each in either if each in done] for either in needed]
    return max((min(each) for each in times), default=0.0) if all(times) else None


def _peak_micro_batches(ops: Sequence[_Operation]) -> int:
    """Return the peak forward passes through a stage whose backward has not ended."""
    kept = peak = 0
    for op in ops:
        kept += {"F": 1, "B": -1, "W": -1, "I": 0}[op.kind]
        peak = max(peak, kept)
    return peak
