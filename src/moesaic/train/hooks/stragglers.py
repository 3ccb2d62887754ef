"""WatchStragglers: which rank the others wait for, while all of them still work."""

from statistics import median

import torch

from moesaic.train.hooks.hook import Hook
from moesaic.train.trainer import StepReport, Trainer

SLOW_RATIO = 1.5  # times the median rank
SLOW_ROWS = 3  # rows of metrics in a row, before it is said


class StragglerHook(Hook):
    """Compares, at every row of metrics, the time that each rank worked itself.

    A step takes all ranks equally long, for the quick ones wait in collectives for the slow one;
    so the time in collectives is taken off. On a GPU it is the host's time: a kernel that is queued
    and not waited for is nobody's. One gather of one number a rank.
    """

    def __init__(self, *, slow_ratio: float = SLOW_RATIO, rows: int = SLOW_ROWS) -> None:
        self._slow_ratio, self._rows = slow_ratio, rows
        self._busy_s, self._steps = 0.0, 0
        self._suspect, self._in_a_row = -1, 0

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        self._busy_s += report.seconds - report.collective_seconds
        self._steps += 1
        run = trainer.run
        if trainer.world.size > 1 and run.log.is_due(report.step, steps=run.steps):
            mine = torch.tensor([self._busy_s / self._steps], dtype=torch.float64)
            seconds = [float(part) for part in trainer.world.all_gather(mine)]
            self._busy_s, self._steps = 0.0, 0
            self._compare(trainer, seconds)

    def _compare(self, trainer: Trainer, seconds: list[float]) -> None:
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        others = median(s for rank, s in enumerate(seconds) if rank != slowest)
        ratio = seconds[slowest] / max(others, 1e-9)
        trainer.event_log.record_values({"perf/slowest_rank": float(slowest), "perf/slowest_ratio": ratio})
        again = slowest == self._suspect and ratio > self._slow_ratio
        self._in_a_row = self._in_a_row + 1 if again else int(ratio > self._slow_ratio)
        self._suspect = slowest
        if self._in_a_row == self._rows:
            trainer.event_log.add_note(
                f"step {trainer.step}: rank {slowest} works {ratio:.1f} times as long as the "
                f"others ({1e3 * seconds[slowest]:.0f} ms a step, theirs {1e3 * others:.0f} ms), "
                f"for {self._rows} rows of metrics now: look at its machine"
            )
