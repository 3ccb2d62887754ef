"""Run functions on N CPU ranks (gloo), forked from this process; failures are raised here."""

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
    """Run ``function(*arguments)`` on ``world_size`` ranks; return their results in rank order.

    Results are pickled to files. Ranks are forked, so ``function`` may be a local one and starts in
    0.05 s; their store is a file, so no port is needed. ``collective_timeout_s`` is the timeout of
    collectives. Raises RankError.
    """
    outcomes = run_cases_on_ranks(
        world_size,
        lambda case: function(*case),
        [arguments],
        timeout_s=timeout_s,
        collective_timeout_s=collective_timeout_s,
    )
    outcome = next(iter(outcomes))
    if isinstance(outcome, RankError):
        raise outcome
    return outcome


def run_cases_on_ranks(
    world_size: int,
    function: Callable[[Any], Any],
    cases: Sequence[Any],
    *,
    timeout_s: float = 60.0,
    collective_timeout_s: float | None = None,
) -> Iterator[list[Any] | RankError]:
    """Yield for each case what ``function(case)`` returned on each rank, or its failure.

    The ranks are forked once, and again after a case that failed or took over ``timeout_s``; each
    case has its own process group, so that no state passes to the next.
    """
    first = 0
    while first < len(cases):
        with tempfile.TemporaryDirectory() as folder:
            collective_s = collective_timeout_s or timeout_s
            ranks = _ForkedRanks(Path(folder), world_size, function, cases, first, collective_s)
            for outcome in ranks.run_cases(timeout_s):
                first += 1
                yield outcome


@dataclass(frozen=True, slots=True)
class _ForkedRanks:
    """Ranks that run the cases from ``first`` on, until one fails."""

    folder: Path
    world_size: int
    function: Callable[[Any], Any]
    cases: Sequence[Any]
    first: int
    collective_timeout_s: float

    def run_cases(self, timeout_s: float) -> Iterator[list[Any] | RankError]:
        """Fork the ranks and yield the outcomes of the cases, a failure last."""
        processes = self._fork()
        try:
            for number in range(self.first, len(self.cases)):
                outcome = self._outcome(number, processes=processes, timeout_s=timeout_s)
                yield outcome
                if isinstance(outcome, RankError):
                    return
        finally:
            for process in processes:
                process.kill()
                process.join()

    def _fork(self) -> list[BaseProcess]:
        # imported when first used, by torch.optim, ZeRO and pipelines: each fork would take seconds
        for name in ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.pipelining"):
            importlib.import_module(name)
        context = get_context("fork")
        processes: list[BaseProcess] = [
            context.Process(target=self._run, args=(rank,)) for rank in range(self.world_size)
        ]
        for process in processes:
            process.start()
        return processes

    def _outcome(
        self, number: int, *, processes: Sequence[BaseProcess], timeout_s: float
    ) -> list[Any] | RankError:
        """Wait for the results of all ranks, the timeout, or an exit (and the others' errors)."""
        results = self._paths(number, "result")
        deadline, exited = time.monotonic() + timeout_s, False
        while True:
            codes = [process.exitcode for process in processes]  # results are there before these
            over = None not in codes or time.monotonic() > deadline
            if all(path.exists() for path in results):
                return [pickle.loads(path.read_bytes()) for path in results]
            if over:
                return RankError(self._failure_text(number, processes=processes))
            if not exited and any(codes):
                exited, deadline = True, min(deadline, time.monotonic() + 1.0)
            time.sleep(0.005)

    def _run(self, rank: int) -> None:
        """Run as one rank: write the result of each case, or the first failure, to the folder."""
        torch.set_num_threads(1)
        number = self.first
        try:
            for number in range(self.first, len(self.cases)):
                self._run_case(rank, number)
            code = 0
        except BaseException:
            text = f"{time.time()}\n{traceback.format_exc()}"
            self._paths(number, "failure")[rank].write_text(text)
            code = 1
        os._exit(code)  # without the exit handlers of the parent's test runner

    def _run_case(self, rank: int, number: int) -> None:
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{self.folder}/store-{number}",
            rank=rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=self.collective_timeout_s),
        )
        result = pickle.dumps(self.function(self.cases[number]))
        distributed.barrier()  # a fast rank must not close connections that others still use
        distributed.destroy_process_group()
        partial_file = self._paths(number, "part")[rank]
        partial_file.write_bytes(result)
        partial_file.rename(self._paths(number, "result")[rank])

    def _paths(self, number: int, kind: str) -> list[Path]:
        """Return the files, one a rank, for outcomes of one kind of a case."""
        return [self.folder / f"{number}.{rank}.{kind}" for rank in range(self.world_size)]

    def _failure_text(self, number: int, *, processes: Sequence[BaseProcess]) -> str:
        paths = self._paths(number, "failure")
        for rank, (process, path) in enumerate(zip(processes, paths, strict=True)):
            if process.exitcode and not path.exists():  # the others only report that it is gone
                return f"rank {rank} died with exit code {process.exitcode}"
        failures = [
            (path.read_text().partition("\n"), rank)
            for rank, path in enumerate(paths)
            if path.exists()
        ]
        if not failures:
            return "the ranks did not end in time"
        (_, _, text), rank = min(failures, key=lambda failure: float(failure[0][0]))
        return f"rank {rank} failed:\n{text}"
