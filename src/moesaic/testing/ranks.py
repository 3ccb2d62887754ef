"""A function on N CPU ranks (gloo), forked from this process; the first failure is raised here."""

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # torch.optim imports it when first used: seconds that each fork would pay
import torch.distributed as distributed


class RankError(AssertionError):
    """A rank raised, died or hung. The text holds that rank's own traceback."""


def run_on_ranks(
    world: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout_s: float = 60.0,
    patience_s: float | None = None,
) -> list[Any]:
    """Run ``function(*arguments)`` on ``world`` ranks; return their results in rank order.

    Results travel by pickle through a file of ours. Forked, so ``function`` may be local and starts
    in 0.05 s; the ranks meet in a file, so no port is needed. ``patience_s`` is how long a
    collective waits. Raises RankError.
    """
    fork = get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        job = _Job(Path(folder), world, function, arguments, patience_s or timeout_s)
        ranks = [fork.Process(target=job.run, args=(rank,)) for rank in range(world)]
        for rank in ranks:
            rank.start()
        try:
            _wait(ranks, until=time.monotonic() + timeout_s)
            return [_result(job.folder, rank, process) for rank, process in enumerate(ranks)]
        finally:
            for process in ranks:
                process.kill()
                process.join()


@dataclass(frozen=True, slots=True)
class _Job:
    folder: Path
    world: int
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    patience_s: float

    def run(self, rank: int) -> None:
        """Be one rank, and leave a result or a failure in the folder."""
        torch.set_num_threads(1)
        try:
            self._join(rank)
            result = self.function(*self.arguments)
            (self.folder / f"{rank}.result").write_bytes(pickle.dumps(result))
            distributed.barrier()  # a quick rank must not tear down while others still connect
            distributed.destroy_process_group()
            code = 0
        except BaseException:
            failure = self.folder / f"{rank}.failure"
            failure.write_text(f"{time.time()}\n{traceback.format_exc()}")
            code = 1
        os._exit(code)  # no clean-up of the parent's test runner in its fork

    def _join(self, rank: int) -> None:
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{self.folder}/store",
            rank=rank,
            world_size=self.world,
            timeout=timedelta(seconds=self.patience_s),
        )


def _wait(ranks: Sequence[BaseProcess], *, until: float) -> None:
    """Until all have ended, it is late, or one has failed (and the others had time to say so)."""
    while any(rank.is_alive() for rank in ranks) and time.monotonic() < until:
        if any(rank.exitcode for rank in ranks):
            until = min(until, time.monotonic() + 1.0)
        time.sleep(0.005)


def _result(folder: Path, rank: int, process: BaseProcess) -> Any:
    failures = sorted(folder.glob("*.failure"), key=lambda path: float(path.open().readline()))
    if failures:
        text = failures[0].read_text().partition("\n")[2]
        raise RankError(f"rank {failures[0].stem} failed:\n{text}")
    if process.exitcode is None:
        raise RankError(f"rank {rank} did not end in time")
    if process.exitcode:
        raise RankError(f"rank {rank} died with exit code {process.exitcode}")
    return pickle.loads((folder / f"{rank}.result").read_bytes())
