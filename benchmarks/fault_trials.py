"""Fault injection: ranks that are killed, stopped, raise or loop, and the run that resumes.

A job run is several forked ranks that call ``train`` with ``resume=ResumeLatest()``. As under
torchrun, this process is the launcher and holds their rendezvous store. A fault is injected into
one rank at a given point; the others must end in time and name it, and the next job run must
resume.
"""

import json
import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch
import torch._dynamo  # see distributed/forked_ranks.py: each fork would import it for seconds
import torch.distributed as distributed
from compare_runs import compare_run_dirs

from moesaic.checkpoint.checkpoint_directory import Disk
from moesaic.core.errors import UserError
from moesaic.core.files import atomic_write
from moesaic.distributed import world as collectives
from moesaic.distributed.hang_report import HangReport, LostRankError
from moesaic.train.resume import ResumeLatest
from moesaic.train.run import Run
from moesaic.train.run_training import train
from moesaic.train.trainer import StepReport, Trainer
from moesaic.train.training_hooks import Hook, no_progress

FaultKind = Literal["kill", "stop", "exception", "loop"]
InjectionPoint = Literal["forward", "collective", "save", "between steps", "any"]
FAULT_TYPES: tuple[tuple[FaultKind, InjectionPoint], ...] = (
    ("kill", "forward"),
    ("kill", "collective"),
    ("kill", "save"),
    ("kill", "between steps"),
    ("kill", "any"),
    ("stop", "forward"),
    ("stop", "collective"),
    ("stop", "save"),
    ("stop", "between steps"),
    ("stop", "any"),
    ("exception", "forward"),
    ("exception", "collective"),
    ("exception", "save"),
    ("exception", "between steps"),
    ("loop", "forward"),
    ("loop", "between steps"),
)
EXIT_LOST_RANK, EXIT_ERROR, EXIT_USER_ERROR = 3, 1, 2  # exit codes of a rank
SLACK_S = 4.0  # what a loaded machine may add to the time limit of a job


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of ``kind`` in ``rank`` at ``point``: after so many steps (seconds, for "any")."""

    kind: FaultKind
    point: InjectionPoint
    rank: int
    after: float

    def inject(self, stamp: Path) -> None:
        """Inject it into this process, and write the time to ``stamp``."""
        stamp.write_text(str(time.time()))
        match self.kind:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "exception":
                raise RuntimeError("an injected fault")
            case "loop":
                while True:
                    pass


@dataclass(frozen=True, slots=True)
class JobRun:
    """The end of a job: exit codes, hang reports and stderr by rank.

    ``seconds`` is the time from the fault to the exit of the last rank, None if it was not
    injected.
    """

    exit_codes: tuple[int | None, ...]
    reports: dict[int, HangReport]
    stderr: dict[int, str]
    seconds: float | None

    @property
    def finished(self) -> bool:
        return not any(self.exit_codes)


@dataclass(frozen=True, slots=True)
class FaultTrial:
    """One fault, and what the job did wrong after it (nothing, if it passed)."""

    fault: Fault
    world_size: int
    seconds: float
    sentence: str
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FaultResult:
    """A series of faults. ``differences`` are between finished runs and one without faults."""

    trials: tuple[FaultTrial, ...]
    job_runs: int
    compared: int
    seconds: float
    differences: tuple[str, ...]

    @property
    def problems(self) -> list[str]:
        """Every problem, with its fault."""
        return [f"{o.fault} of {o.world_size}: {why}" for o in self.trials for why in o.problems]


def sample_faults(count: int, *, world_size: int, seed: int) -> list[Fault]:
    """Return faults of all types in turn, in random ranks at random steps."""
    draw, faults = random.Random(seed), []
    for number in range(count):
        kind, moment = FAULT_TYPES[(seed + number) % len(FAULT_TYPES)]
        after = draw.uniform(0.0, 1.5) if moment == "any" else draw.randint(1, 5)
        faults.append(Fault(kind, moment, draw.randrange(world_size), after))
    return faults


def run_fault_trials(
    run: Run, *, folder: Path, world_size: int, faults: Sequence[Fault]
) -> FaultResult:
    """Inject one fault into each job run of ``world_size`` ranks; let it finish and compare it.

    A run that finishes before its fault is compared as well; the next one starts in a new directory
    with that fault.
    """
    start = time.monotonic()
    fault_free = run_job(run, folder / "fault-free", world_size=world_size)
    if not fault_free.finished:
        raise RuntimeError(f"a run without faults failed: {fault_free.stderr}")
    trials: list[FaultTrial] = []
    differences: list[str] = []
    job_runs, finished = 1, 0
    while len(trials) < len(faults) and not differences:
        fault, here = faults[len(trials)], folder / f"faulty-{finished}"
        job_run = run_job(run, here, world_size=world_size, fault=fault)
        job_runs += 1
        if job_run.finished:
            differences += compare_run_dirs(folder / "fault-free", here)
            finished += 1
        elif job_run.seconds is not None:
            trials.append(_fault_trial(job_run, fault=fault, run=run))
        else:
            differences.append(f"a job run failed before its fault: {job_run.stderr}")
    last = folder / f"faulty-{finished}"
    job_run = run_job(run, last, world_size=world_size)
    differences += (
        compare_run_dirs(folder / "fault-free", last) if job_run.finished else [str(job_run.stderr)]
    )
    seconds = time.monotonic() - start
    return FaultResult(tuple(trials), job_runs + 1, finished + 1, seconds, tuple(differences))


def run_job(run: Run, out: Path, *, world_size: int, fault: Fault | None = None) -> JobRun:
    """Run one job to its end, with or without a fault."""
    out.parent.mkdir(parents=True, exist_ok=True)
    notes = out.with_name(f"{out.name}.notes")
    notes.mkdir(exist_ok=True)
    for old in notes.iterdir():
        old.unlink()
    job = _FaultJob(run, out, notes, world_size, fault)
    fork = get_context("fork")
    ranks = [fork.Process(target=job.run_rank, args=(rank,)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    # after the forks: a fork would inherit a lock held by a thread of the store
    store = distributed.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30)
    )
    try:
        atomic_write(job.port, str(store.port))
        if fault is not None and fault.point == "any":
            job.signal_rank(ranks[fault.rank])
        job.wait(ranks)
        return job.collect(ranks)
    finally:
        for process in ranks:
            process.kill()
            process.join()


def max_shutdown_s(run: Run) -> float:
    """Return the time limit of a job after a fault: timeout, grace period and slack."""
    return run.collective_timeout_s + 3 * max(run.collective_timeout_s * 4 / 30, 1.0) + SLACK_S


@dataclass(frozen=True, slots=True)
class _FaultJob:
    run: Run
    out: Path
    log_dir: Path
    world_size: int
    fault: Fault | None

    @property
    def port(self) -> Path:
        """The file in which the launcher writes the port of its store."""
        return self.log_dir / "port"

    @property
    def stamp(self) -> Path:
        return self.log_dir / "injected"

    def run_rank(self, rank: int) -> None:
        """Run as one rank."""
        torch.set_num_threads(1)
        stderr = os.open(self.log_dir / f"{rank}.err", os.O_WRONLY | os.O_CREAT)
        os.dup2(stderr, 2)
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.world_size),
        }
        while not self.port.is_file():
            time.sleep(0.005)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.port.read_text()}
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        code = 0
        try:
            hooks = (
                ()
                if self.fault is None
                else (FaultInjection(self.fault, stamp=self.stamp, rank=rank),)
            )
            train(self.run, self.out, resume=ResumeLatest(), hooks=hooks, progress=no_progress)
        except LostRankError as error:
            (self.log_dir / f"{rank}.lost").write_text(json.dumps(error.report.to_dict()))
            code = EXIT_LOST_RANK
        except UserError as error:
            os.write(2, str(error).encode())
            code = EXIT_USER_ERROR
        except BaseException:
            os.write(2, traceback.format_exc().encode())
            code = EXIT_ERROR
        os._exit(code)  # without the exit handlers of the parent's test runner

    def signal_rank(self, process: BaseProcess) -> None:
        assert self.fault is not None
        time.sleep(self.fault.after)
        if process.is_alive() and process.pid is not None:
            self.stamp.write_text(str(time.time()))
            sign = signal.SIGKILL if self.fault.kind == "kill" else signal.SIGSTOP
            os.kill(process.pid, sign)

    def wait(self, ranks: Sequence[BaseProcess]) -> None:
        """Wait until all but a stopped rank have exited, or the time limit is over."""
        others = list(ranks)
        if self.fault is not None and self.fault.kind == "stop":
            del others[self.fault.rank]
        deadline = time.time() + 120.0
        while any(process.is_alive() for process in others) and time.time() < deadline:
            if self.stamp.is_file():
                deadline = min(
                    deadline, (self._injection_time() or time.time()) + max_shutdown_s(self.run)
                )
            time.sleep(0.01)

    def collect(self, ranks: Sequence[BaseProcess]) -> JobRun:
        ended, struck = time.time(), self._injection_time()
        stderr = {
            rank: text
            for rank in range(self.world_size)
            if (text := (self.log_dir / f"{rank}.err").read_text(errors="replace"))
        }
        reports = {
            int(path.stem): HangReport.from_dict(json.loads(path.read_text()))
            for path in self.log_dir.glob("*.lost")
        }
        codes = tuple(process.exitcode for process in ranks)
        return JobRun(codes, reports, stderr, None if struck is None else ended - struck)

    def _injection_time(self) -> float | None:
        try:
            return float(self.stamp.read_text())
        except (FileNotFoundError, ValueError):
            return None


class FaultInjection(Hook):
    """Hook that injects a fault into its rank once; other ranks are only delayed for it."""

    def __init__(self, fault: Fault, *, stamp: Path, rank: int) -> None:
        self._fault, self._stamp = fault, stamp
        self._is_target = rank == fault.rank
        self._at = -1

    def before_run(self, trainer: Trainer) -> None:
        self._at = trainer.step + int(self._fault.after)
        now = _at_step(trainer, self._at)
        match self._fault.point:
            case "forward" if self._is_target:
                trainer.model.register_forward_pre_hook(
                    lambda *_: self._inject() if now() else None
                )
            case "collective":
                _call_before(collectives.distributed, "all_reduce", self._in_collective, when=now)
            case "save" if self._is_target:
                _call_before(Disk, "write", self._inject, when=self._second_file(trainer))
                if trainer.world.rank:
                    original = trainer.snapshot
                    trainer.snapshot = lambda: self._inject() or original()  # pyright: ignore
            case _:
                pass

    def after_step(self, trainer: Trainer, report: StepReport) -> None:  # noqa: ARG002
        if self._is_target and self._fault.point == "between steps" and report.step == self._at:
            self._inject()

    def _second_file(self, trainer: Trainer) -> Callable[[], bool]:
        seen: list[int] = []

        def now() -> bool:
            if trainer.step >= self._at:
                seen.append(trainer.step)
            return len(seen) > 1

        return now

    def _in_collective(self) -> None:
        if not self._is_target:
            time.sleep(0.05)  # so that the faulty rank waits inside
        elif self._fault.kind == "exception":
            self._inject()
        else:
            threading.Timer(0.02, self._inject).start()

    def _inject(self) -> None:
        if not self._stamp.exists():
            self._fault.inject(self._stamp)


def _at_step(trainer: Trainer, step: int) -> Callable[[], bool]:
    return lambda: trainer.step + 1 == step


def _call_before(
    owner: Any, name: str, action: Callable[[], None], *, when: Callable[[], bool]
) -> None:
    """Do ``action`` before the first call of a function of ``owner`` for which ``when`` is true."""
    original, done = vars(owner)[name], []

    def called(*arguments: Any, **named: Any) -> Any:
        if when() and not done:
            done.append(True)
            action()
        return original(*arguments, **named)

    setattr(owner, name, called)


def _fault_trial(job_run: JobRun, *, fault: Fault, run: Run) -> FaultTrial:
    seconds = job_run.seconds or 0.0
    sentence = next((v.sentence for v in job_run.reports.values()), "")
    return FaultTrial(
        fault,
        len(job_run.exit_codes),
        seconds,
        sentence,
        tuple(_trial_problems(job_run, fault, run)),
    )


def _trial_problems(job_run: JobRun, fault: Fault, run: Run) -> Iterator[str]:
    if (job_run.seconds or 0.0) > max_shutdown_s(run):
        yield f"it took {job_run.seconds:.1f} s to end"
    if not job_run.reports:
        yield f"no rank reported a lost rank: {job_run.stderr}"
    for rank, code in enumerate(job_run.exit_codes):
        if rank != fault.rank and code not in (EXIT_LOST_RANK, EXIT_ERROR):
            yield f"rank {rank} ended with {code}"
    for rank, report in job_run.reports.items():
        if report.ranks != (fault.rank,):
            yield f"rank {rank} reports {report.ranks}: {report.sentence}"
        if not report.op:
            yield f"rank {rank} names no collective: {report.sentence}"
