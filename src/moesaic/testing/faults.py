"""Faults: ranks that are killed, stopped, raise or loop for ever, and the run that goes on after.

A life is a job of several forked ranks that call ``train`` with ``resume=Auto()``. They meet as
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
import torch._dynamo  # see testing/ranks.py: without it each life spends seconds on its import
import torch.distributed as distributed

from moesaic.checkpoint.disk import Disk
from moesaic.core.errors import UserError
from moesaic.core.files import write_whole
from moesaic.dist import world as collectives
from moesaic.dist.verdict import LostRankError, Verdict
from moesaic.testing.kills import compare
from moesaic.train.hooks.hook import Hook
from moesaic.train.job import train
from moesaic.train.resume import Auto
from moesaic.train.run import Run
from moesaic.train.trainer import StepReport, Trainer
from moesaic.train.watch import silent

Kind = Literal["kill", "stop", "exception", "loop"]
Moment = Literal["forward", "collective", "save", "between steps", "any"]
PAIRS: tuple[tuple[Kind, Moment], ...] = (
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
LOST, FAILED, MISTAKEN = 3, 1, 2  # exit codes of a rank
SLACK_S = 4.0  # what a loaded machine may add to the time in which a job must end


@dataclass(frozen=True, slots=True)
class Fault:
    """``kind`` strikes ``rank`` at ``moment``: ``after`` steps (or, at any moment, seconds)."""

    kind: Kind
    moment: Moment
    rank: int
    after: float

    def strike(self, stamp: Path) -> None:
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
class Life:
    """How a job ended: exit codes and words by rank; seconds from the fault to the last rank's end.

    ``seconds`` is None where the fault came too late to strike.
    """

    codes: tuple[int | None, ...]
    verdicts: dict[int, Verdict]
    words: dict[int, str]
    seconds: float | None

    @property
    def finished(self) -> bool:
        return not any(self.codes)


@dataclass(frozen=True, slots=True)
class Ordeal:
    """One fault and what was wrong with the way the job took it (nothing, if all is well)."""

    fault: Fault
    world: int
    seconds: float
    sentence: str
    wrong: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Endured:
    """A series of faults. ``differences`` are those of finished runs from an undisturbed one."""

    ordeals: tuple[Ordeal, ...]
    lives: int
    compared: int
    seconds: float
    differences: tuple[str, ...]

    @property
    def wrong(self) -> list[str]:
        """Every complaint, with its fault."""
        return [f"{o.fault} of {o.world}: {why}" for o in self.ordeals for why in o.wrong]


def draw_faults(count: int, *, world: int, seed: int) -> list[Fault]:
    """Return faults of all kinds at all moments in turn, of random ranks at random steps."""
    draw, faults = random.Random(seed), []
    for number in range(count):
        kind, moment = PAIRS[(seed + number) % len(PAIRS)]
        after = draw.uniform(0.0, 1.5) if moment == "any" else draw.randint(1, 5)
        faults.append(Fault(kind, moment, draw.randrange(world), after))
    return faults


def endure(run: Run, *, folder: Path, world: int, faults: Sequence[Fault]) -> Endured:
    """Give a run of ``world`` ranks one fault a life; let it finish and compare it.

    A run that finishes before a fault struck is compared as well, and the next one begins in a
    directory of its own, with that fault.
    """
    began = time.monotonic()
    undisturbed = live(run, folder / "whole", world=world)
    if not undisturbed.finished:
        raise RuntimeError(f"an undisturbed run failed: {undisturbed.words}")
    ordeals: list[Ordeal] = []
    differences: list[str] = []
    lives, finished = 1, 0
    while len(ordeals) < len(faults) and not differences:
        fault, here = faults[len(ordeals)], folder / f"faulty-{finished}"
        life = live(run, here, world=world, fault=fault)
        lives += 1
        if life.finished:
            differences += compare(folder / "whole", here)
            finished += 1
        elif life.seconds is not None:
            ordeals.append(_ordeal(life, fault=fault, run=run))
        else:
            differences.append(f"a life failed before its fault: {life.words}")
    last = folder / f"faulty-{finished}"
    life = live(run, last, world=world)
    differences += compare(folder / "whole", last) if life.finished else [str(life.words)]
    seconds = time.monotonic() - began
    return Endured(tuple(ordeals), lives + 1, finished + 1, seconds, tuple(differences))


def live(run: Run, out: Path, *, world: int, fault: Fault | None = None) -> Life:
    """Run one job to its end, with a fault or without."""
    out.parent.mkdir(parents=True, exist_ok=True)
    notes = out.with_name(f"{out.name}.notes")
    notes.mkdir(exist_ok=True)
    for old in notes.iterdir():
        old.unlink()
    job = _Job(run, out, notes, world, fault)
    fork = get_context("fork")
    ranks = [fork.Process(target=job.be, args=(rank,)) for rank in range(world)]
    for process in ranks:
        process.start()
    # after the forks: a thread of the store's may hold a lock, which a fork would hold for ever
    store = distributed.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30)
    )
    try:
        write_whole(job.port, str(store.port))
        if fault is not None and fault.moment == "any":
            job.strike_from_outside(ranks[fault.rank])
        job.wait(ranks)
        return job.life(ranks)
    finally:
        for process in ranks:
            process.kill()
            process.join()


def bound_s(run: Run) -> float:
    """The seconds in which a job must have ended after a fault: patience, grace and some slack."""
    return run.patience_s + 3 * max(run.patience_s * 4 / 30, 1.0) + SLACK_S


@dataclass(frozen=True, slots=True)
class _Job:
    run: Run
    out: Path
    notes: Path
    world: int
    fault: Fault | None

    @property
    def port(self) -> Path:
        """Where the launcher writes at which port its store is."""
        return self.notes / "port"

    @property
    def stamp(self) -> Path:
        return self.notes / "struck"

    def be(self, rank: int) -> None:
        """Be one rank."""
        torch.set_num_threads(1)
        words = os.open(self.notes / f"{rank}.err", os.O_WRONLY | os.O_CREAT)
        os.dup2(words, 2)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.world)}
        while not self.port.is_file():
            time.sleep(0.005)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.port.read_text()}
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        code = 0
        try:
            hooks = () if self.fault is None else (Inject(self.fault, stamp=self.stamp, rank=rank),)
            train(self.run, self.out, resume=Auto(), hooks=hooks, board=silent)
        except LostRankError as error:
            (self.notes / f"{rank}.lost").write_text(json.dumps(error.verdict.plain()))
            code = LOST
        except UserError as error:
            os.write(2, str(error).encode())
            code = MISTAKEN
        except BaseException:
            os.write(2, traceback.format_exc().encode())
            code = FAILED
        os._exit(code)  # no clean-up of the parent's test runner in its fork

    def strike_from_outside(self, process: BaseProcess) -> None:
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
                late = min(late, (self._struck() or time.time()) + bound_s(self.run))
            time.sleep(0.01)

    def life(self, ranks: Sequence[BaseProcess]) -> Life:
        ended, struck = time.time(), self._struck()
        words = {
            rank: text
            for rank in range(self.world)
            if (text := (self.notes / f"{rank}.err").read_text(errors="replace"))
        }
        verdicts = {
            int(path.stem): Verdict.from_plain(json.loads(path.read_text()))
            for path in self.notes.glob("*.lost")
        }
        codes = tuple(process.exitcode for process in ranks)
        return Life(codes, verdicts, words, None if struck is None else ended - struck)

    def _struck(self) -> float | None:
        try:
            return float(self.stamp.read_text())
        except (FileNotFoundError, ValueError):
            return None


class Inject(Hook):
    """Strikes its rank once, at the moment of a fault; other ranks are only made late for it."""

    def __init__(self, fault: Fault, *, stamp: Path, rank: int) -> None:
        self._fault, self._stamp = fault, stamp
        self._mine = rank == fault.rank
        self._at = -1

    def before_run(self, trainer: Trainer) -> None:
        self._at = trainer.step + int(self._fault.after)
        now = _at_step(trainer, self._at)
        match self._fault.moment:
            case "forward" if self._mine:
                trainer.model.register_forward_pre_hook(
                    lambda *_: self._strike() if now() else None
                )
            case "collective":
                _before(collectives.distributed, "all_reduce", self._in_collective, when=now)
            case "save" if self._mine:
                _before(Disk, "write", self._strike, when=self._second_file(trainer))
                if trainer.world.rank:
                    original = trainer.snapshot
                    trainer.snapshot = lambda: self._strike() or original()  # pyright: ignore
            case _:
                pass

    def after_step(self, trainer: Trainer, report: StepReport) -> None:  # noqa: ARG002
        if self._mine and self._fault.moment == "between steps" and report.step == self._at:
            self._strike()

    def _second_file(self, trainer: Trainer) -> Callable[[], bool]:
        seen: list[int] = []

        def now() -> bool:
            if trainer.step >= self._at:
                seen.append(trainer.step)
            return len(seen) > 1

        return now

    def _in_collective(self) -> None:
        if not self._mine:
            time.sleep(0.05)  # so that the struck rank waits inside
        elif self._fault.kind == "exception":
            self._strike()
        else:
            threading.Timer(0.02, self._strike).start()

    def _strike(self) -> None:
        if not self._stamp.exists():
            self._fault.strike(self._stamp)


def _at_step(trainer: Trainer, step: int) -> Callable[[], bool]:
    return lambda: trainer.step + 1 == step


def _before(owner: Any, name: str, action: Callable[[], None], *, when: Callable[[], bool]) -> None:
    """Do ``action`` before the first call of a function of ``owner`` at which ``when`` holds."""
    original, done = vars(owner)[name], []

    def called(*arguments: Any, **named: Any) -> Any:
        if when() and not done:
            done.append(True)
            action()
        return original(*arguments, **named)

    setattr(owner, name, called)


def _ordeal(life: Life, *, fault: Fault, run: Run) -> Ordeal:
    seconds = life.seconds or 0.0
    sentence = next((v.sentence for v in life.verdicts.values()), "")
    return Ordeal(fault, len(life.codes), seconds, sentence, tuple(_complaints(life, fault, run)))


def _complaints(life: Life, fault: Fault, run: Run) -> Iterator[str]:
    if (life.seconds or 0.0) > bound_s(run):
        yield f"it took {life.seconds:.1f} s to end"
    if not life.verdicts:
        yield f"no rank said who was lost: {life.words}"
    for rank, code in enumerate(life.codes):
        if rank != fault.rank and code not in (LOST, FAILED):
            yield f"rank {rank} ended with {code}"
    for rank, verdict in life.verdicts.items():
        if verdict.ranks != (fault.rank,):
            yield f"rank {rank} blames {verdict.ranks}: {verdict.sentence}"
        if not verdict.op:
            yield f"rank {rank} names no collective: {verdict.sentence}"
