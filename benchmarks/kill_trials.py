"""Kill trials: a training process killed at random times and resumed, until it has finished.

Every process is forked, calls ``train`` with ``resume=ResumeLatest()`` and gets SIGKILL after a
random time: while it prepares data, in a step, or in the middle of a save.
"""

import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # see distributed/forked_ranks.py: each fork would import it for seconds
from compare_runs import compare_run_dirs

from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.errors import UserError
from moesaic.train.resume import ResumeLatest
from moesaic.train.run import Run
from moesaic.train.run_training import train
from moesaic.train.training_hooks import no_progress


@dataclass(frozen=True, slots=True)
class KillCampaign:
    """The result of a series of kills. ``phases`` counts what the process was doing at the kill."""

    kills: int
    processes: int
    phases: dict[str, int]
    seconds: float
    differences: tuple[str, ...]


def train_once(run: Run, out: Path) -> float:
    """Train in a forked process without a kill. Returns seconds."""
    start = time.monotonic()
    process = _start_process(run, out)
    process.join()
    if process.exitcode:
        raise RuntimeError(f"a run without kills ended with exit code {process.exitcode}")
    return time.monotonic() - start


def kill_and_resume(run: Run, *, folder: Path, kills: int, seed: int) -> KillCampaign:
    """Kill a run ``kills`` times, let it finish, and compare it with a run without kills.

    A run that finishes before all kills are done is compared as well, and the next one starts in a
    new directory, so that every kill hits a working process.
    """
    draw, phases, start = random.Random(seed), Counter[str](), time.monotonic()
    reference = folder / "reference"
    train_once(run, reference)  # builds the corpus and the shards too
    longest = train_once(run, folder / "timed")
    differences, processes, finished = compare_run_dirs(reference, folder / "timed"), 0, 0
    run_dir = folder / "killed-0"
    while phases.total() < kills and not differences:
        process = _start_process(run, run_dir)
        processes += 1
        process.join(timeout=draw.uniform(0.0, longest))
        if process.exitcode is None and process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            phases[_phase_at_kill(RunDir(run_dir))] += 1
        elif process.exitcode:
            differences.append(f"process {processes} ended with exit code {process.exitcode}")
        else:
            longest *= 0.8  # the machine has become faster: wait less, or no process is killed
            differences += compare_run_dirs(reference, run_dir)
            finished += 1
            run_dir = folder / f"killed-{finished}"
    train_once(run, run_dir)
    differences += compare_run_dirs(reference, run_dir)
    seconds = time.monotonic() - start
    return KillCampaign(phases.total(), processes + 1, dict(phases), seconds, tuple(differences))


def _start_process(run: Run, out: Path) -> Any:
    process = get_context("fork").Process(target=_train_and_exit, args=(run, out))
    process.start()
    return process


def _train_and_exit(run: Run, out: Path) -> None:
    torch.set_num_threads(1)
    try:
        train(run, out, resume=ResumeLatest(), progress=no_progress)
    except UserError as error:
        out.mkdir(parents=True, exist_ok=True)
        (out / "error.txt").write_text(str(error))
        os._exit(2)
    os._exit(0)


def _phase_at_kill(folder: RunDir) -> str:
    if any(folder.checkpoints.glob(".*.part")) or any(folder.checkpoints.glob(".*.gone")):
        return "in a save"
    if not folder.tokenizer.is_file():
        return "before the tokenizer"
    return "in training" if folder.metrics.is_file() else "before the first step"
