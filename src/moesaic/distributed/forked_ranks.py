"""Forked: functions on N CPU ranks (gloo), forked from this process; failures are raised here."""

import importlib
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed


class RankError(AssertionError):
    """A rank raised, died or hung. The text holds that rank's own traceback."""


def run_on_ranks(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout_s: float = 60.0,
    collective_timeout_s: float | None = None,
) -> list[Any]:
    """Run ``function(*arguments)`` on ``world`` ranks; return their results in rank order.

    Results travel by pickle through a file of ours. Forked, so ``function`` may be local and starts
    in 0.05 s; the ranks meet in a file, so no port is needed. ``collective_timeout_s`` is how long a
    collective waits. Raises RankError.
    """

    def once(case: tuple[Any, ...]) -> Any:
        return function(*case)

    cases = run_cases_on_ranks(
        world_size,
        once,
        [arguments],
        timeout_s=timeout_s,
        collective_timeout_s=collective_timeout_s,
    )
    found = next(iter(cases))
    if isinstance(found, RankError):
        raise found
    return found


def run_cases_on_ranks(
    world_size: int,
    function: Callable[[Any], Any],
    cases: Sequence[Any],
    *,
    timeout_s: float = 60.0,
    collective_timeout_s: float | None = None,
) -> Iterator[list[Any] | RankError]:
    """Yield for each case what ``function(case)`` returned on each rank, or why it did not.

    The ranks are forked once, and again after a case that failed or took over ``timeout_s``; each
    case has a process group of its own, so nothing of one is left in the next.
    """
    done = 0
    while done < len(cases):
        for found in _run_until_failure(
            world_size,
            function,
            cases,
            first=done,
            timeouts=(timeout_s, collective_timeout_s or timeout_s),
        ):
            done += 1
            yield found


def _run_until_failure(
    world_size: int,
    function: Callable[[Any], Any],
    cases: Sequence[Any],
    *,
    first: int,
    timeouts: tuple[float, float],
) -> Iterator[list[Any] | RankError]:
    """Fork the ranks, and yield what became of the cases from ``first`` on, a failure last."""
    timeout_s, patience_s = timeouts
    with tempfile.TemporaryDirectory() as folder:
        job = _ForkedRanks(Path(folder), world_size, function, cases, first, patience_s)
        ranks = _fork_ranks(job)
        try:
            for number in range(first, len(cases)):
                found = _case_outcome(job, number, ranks=ranks, timeout_s=timeout_s)
                yield found
                if isinstance(found, RankError):
                    return
        finally:
            for process in ranks:
                process.kill()
                process.join()


@dataclass(frozen=True, slots=True)
class _ForkedRanks:
    folder: Path
    world_size: int
    function: Callable[[Any], Any]
    cases: Sequence[Any]
    first: int
    collective_timeout_s: float

    def run(self, rank: int) -> None:
        """Be one rank, and leave a result of each case in the folder, or the first failure."""
        torch.set_num_threads(1)
        number = self.first
        try:
            for number in range(self.first, len(self.cases)):
                self._run_case(rank, number)
            code = 0
        except BaseException:
            text = f"{time.time()}\n{traceback.format_exc()}"
            self.path(number, rank, "failure").write_text(text)
            code = 1
        os._exit(code)  # no clean-up of the parent's test runner in its fork

    def path(self, number: int, rank: int, kind: str) -> Path:
        """Return where a rank leaves what became of a case."""
        return self.folder / f"{number}.{rank}.{kind}"

    def _run_case(self, rank: int, number: int) -> None:
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{self.folder}/store-{number}",
            rank=rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=self.collective_timeout_s),
        )
        result = pickle.dumps(self.function(self.cases[number]))
        distributed.barrier()  # a quick rank must not tear down while others still connect
        distributed.destroy_process_group()
        part = self.path(number, rank, "part")
        part.write_bytes(result)
        part.rename(self.path(number, rank, "result"))


def _fork_ranks(job: _ForkedRanks) -> list[BaseProcess]:
    # torch.optim imports it when first used: seconds that each fork would pay
    importlib.import_module("torch._dynamo")
    fork = get_context("fork")
    ranks: list[BaseProcess] = [
        fork.Process(target=job.run, args=(r,)) for r in range(job.world_size)
    ]
    for process in ranks:
        process.start()
    return ranks


def _case_outcome(
    job: _ForkedRanks, number: int, *, ranks: Sequence[BaseProcess], timeout_s: float
) -> list[Any] | RankError:
    """Wait until all ranks have a result, it is late, or one has ended (and the others said so)."""
    results = [job.path(number, rank, "result") for rank in range(job.world_size)]
    until, ended = time.monotonic() + timeout_s, False
    while not all(path.exists() for path in results):
        if time.monotonic() > until:
            return RankError(_failure_text(job, number, ranks=ranks))
        if not ended and not all(process.is_alive() for process in ranks):
            ended = any(process.exitcode for process in ranks)
            until = min(until, time.monotonic() + 1.0) if ended else until
        time.sleep(0.005)
    return [pickle.loads(path.read_bytes()) for path in results]


def _failure_text(job: _ForkedRanks, number: int, *, ranks: Sequence[BaseProcess]) -> str:
    paths = [job.path(number, rank, "failure") for rank in range(job.world_size)]
    for rank, (process, path) in enumerate(zip(ranks, paths, strict=True)):
        if process.exitcode and not path.exists():  # others only say that it is gone
            return f"rank {rank} died with exit code {process.exitcode}"
    said = [
        (path.read_text().partition("\n"), rank) for rank, path in enumerate(paths) if path.exists()
    ]
    if said:
        (_, _, text), rank = min(said, key=lambda found: float(found[0][0]))
        return f"rank {rank} failed:\n{text}"
    return "the ranks did not end in time"
