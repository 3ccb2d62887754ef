"""Faults: ranks that are killed, stopped, raise or loop for ever, and the run that goes on after.

A life is a job of several forked ranks that call ``train`` with ``resume=ResumeLatest()``. They meet as
under torchrun: this process is the launcher, holds their store, and outlives them. One rank gets a
fault at a given moment; the others must end in time, name it, and the next life must go on.
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
import torch._dynamo  # see distributed/forked_ranks.py: without it each life spends seconds on its import
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
SLACK_S = 4.0  # what a loaded machine may add to the time in which a job must end


@dataclass(frozen=True, slots=True)
class Fault:
    """``kind`` strikes ``rank`` at ``moment``: ``after`` steps (or, at any moment, seconds)."""

    kind: FaultKind
    point: InjectionPoint
    rank: int
    after: float

    def inject(self, stamp: Path) -> None:
        """Do it to this process, and leave the time in ``stamp``."""
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
    """How a job ended: exit codes and words by rank; seconds from the fault to the last rank's end.

    ``seconds`` is None where the fault came too late to strike.
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
    """One fault and what was wrong with the way the job took it (nothing, if all is well)."""

    fault: Fault
    world_size: int
    seconds: float
    sentence: str
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FaultResult:
    """A series of faults. ``differences`` are those of finished runs from an undisturbed one."""

    trials: tuple[FaultTrial, ...]
    job_runs: int
    compared: int
    seconds: float
    differences: tuple[str, ...]

    @property
    def problems(self) -> list[str]:
        """Every complaint, with its fault."""
        return [f"{o.fault} of {o.world_size}: {why}" for o in self.trials for why in o.problems]


def sample_faults(count: int, *, world_size: int, seed: int) -> list[Fault]:
    """Return faults of all kinds at all moments in turn, of random ranks at random steps."""
    draw, faults = random.Random(seed), []
    for number in range(count):
        kind, moment = FAULT_TYPES[(seed + number) % len(FAULT_TYPES)]
        after = draw.uniform(0.0, 1.5) if moment == "any" else draw.randint(1, 5)
        faults.append(Fault(kind, moment, draw.randrange(world_size), after))
    return faults


def run_fault_trials(
    run: Run, *, folder: Path, world_size: int, faults: Sequence[Fault]
) -> FaultResult:
    """Give a run of ``world`` ranks one fault a life; let it finish and compare it.

    A run that finishes before a fault struck is compared as well, and the next one begins in a
    directory of its own, with that fault.
    """
    began = time.monotonic()
    undisturbed = run_job(run, folder / "whole", world_size=world_size)
    if not undisturbed.finished:
        raise RuntimeError(f"an undisturbed run failed: {undisturbed.stderr}")
    ordeals: list[FaultTrial] = []
    differences: list[str] = []
    lives, finished = 1, 0
    while len(ordeals) < len(faults) and not differences:
        fault, here = faults[len(ordeals)], folder / f"faulty-{finished}"
        life = run_job(run, here, world_size=world_size, fault=fault)
        lives += 1
        if life.finished:
            differences += compare_run_dirs(folder / "whole", here)
            finished += 1
        elif life.seconds is not None:
            ordeals.append(_fault_trial(life, fault=fault, run=run))
        else:
            differences.append(f"a life failed before its fault: {life.stderr}")
    last = folder / f"faulty-{finished}"
    life = run_job(run, last, world_size=world_size)
    differences += compare_run_dirs(folder / "whole", last) if life.finished else [str(life.stderr)]
    seconds = time.monotonic() - began
    return FaultResult(tuple(ordeals), lives + 1, finished + 1, seconds, tuple(differences))


def run_job(run: Run, out: Path, *, world_size: int, fault: Fault | None = None) -> JobRun:
    """Run one job to its end, with a fault or without."""
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
    # after the forks: a thread of the store's may hold a lock, which a fork would hold for ever
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
    """The seconds in which a job must have ended after a fault: patience, grace and some slack."""
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
        """Where the launcher writes at which port its store is."""
        return self.log_dir / "port"

    @property
    def stamp(self) -> Path:
        return self.log_dir / "struck"

    def run_rank(self, rank: int) -> None:
        """Be one rank."""
        torch.set_num_threads(1)
        words = os.open(self.log_dir / f"{rank}.err", os.O_WRONLY | os.O_CREAT)
        os.dup2(words, 2)
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
        os._exit(code)  # no clean-up of the parent's test runner in its fork

    def signal_rank(self, process: BaseProcess) -> None:
        assert self.fault is not None
        time.sleep(self.fault.after)
        if process.is_alive() and process.pid is not None:
            self.stamp.write_text(str(time.time()))
            sign = signal.SIGKILL if self.fault.kind == "kill" else signal.SIGSTOP
            os.kill(process.pid, sign)

    def wait(self, ranks: Sequence[BaseProcess]) -> None:
        """Until all but a stopped rank have ended, or the time after the fault is over."""
        others = list(ranks)
        if self.fault is not None and self.fault.kind == "stop":
            del others[self.fault.rank]
        late = time.time() + 120.0
        while any(process.is_alive() for process in others) and time.time() < late:
            if self.stamp.is_file():
                late = min(late, (self._injection_time() or time.time()) + max_shutdown_s(self.run))
            time.sleep(0.01)

    def collect(self, ranks: Sequence[BaseProcess]) -> JobRun:
        ended, struck = time.time(), self._injection_time()
        words = {
            rank: text
            for rank in range(self.world_size)
            if (text := (self.log_dir / f"{rank}.err").read_text(errors="replace"))
        }
        verdicts = {
            int(path.stem): HangReport.from_dict(json.loads(path.read_text()))
            for path in self.log_dir.glob("*.lost")
        }
        codes = tuple(process.exitcode for process in ranks)
        return JobRun(codes, verdicts, words, None if struck is None else ended - struck)

    def _injection_time(self) -> float | None:
        try:
            return float(self.stamp.read_text())
        except (FileNotFoundError, ValueError):
            return None


class FaultInjection(Hook):
    """Strikes its rank once, at the moment of a fault; other ranks are only made late for it."""

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
            time.sleep(0.05)  # so that the struck rank waits inside
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
    """Do ``action`` before the first call of a function of ``owner`` at which ``when`` holds."""
    original, done = vars(owner)[name], []

    def called(*arguments: Any, **named: Any) -> Any:
        if when() and not done:
            done.append(True)
            action()
        return original(*arguments, **named)

    setattr(owner, name, called)


def _fault_trial(life: JobRun, *, fault: Fault, run: Run) -> FaultTrial:
    seconds = life.seconds or 0.0
    sentence = next((v.sentence for v in life.reports.values()), "")
    return FaultTrial(
        fault, len(life.exit_codes), seconds, sentence, tuple(_trial_problems(life, fault, run))
    )


def _trial_problems(life: JobRun, fault: Fault, run: Run) -> Iterator[str]:
    if (life.seconds or 0.0) > max_shutdown_s(run):
        yield f"it took {life.seconds:.1f} s to end"
    if not life.reports:
        yield f"no rank said who was lost: {life.stderr}"
    for rank, code in enumerate(life.exit_codes):
        if rank != fault.rank and code not in (EXIT_LOST_RANK, EXIT_ERROR):
            yield f"rank {rank} ended with {code}"
    for rank, verdict in life.reports.items():
        if verdict.ranks != (fault.rank,):
            yield f"rank {rank} blames {verdict.ranks}: {verdict.sentence}"
        if not verdict.op:
            yield f"rank {rank} names no collective: {verdict.sentence}"
