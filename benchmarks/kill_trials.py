"""Kills: a training process killed at random moments and resumed, until it has finished.

Every life is a forked process that calls ``train`` with ``resume=ResumeLatest()`` and is ended by SIGKILL
after a random time, whatever it is doing: preparing, in a step, or in the middle of a save.
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
import torch._dynamo  # see distributed/forked_ranks.py: without it each life spends seconds on its import
from compare_runs import compare_run_dirs

from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.errors import UserError
from moesaic.train.resume import ResumeLatest
from moesaic.train.run import Run
from moesaic.train.run_training import train
from moesaic.train.training_hooks import no_progress


@dataclass(frozen=True, slots=True)
class KillCampaign:
    """What a series of kills did. ``moments`` counts what the process was doing when it died."""

    kills: int
    processes: int
    moments: dict[str, int]
    seconds: float
    differences: tuple[str, ...]


def train_once(run: Run, out: Path) -> float:
    """Train without a kill, in a process like those that get one. Returns seconds."""
    began = time.monotonic()
    life = _start_process(run, out)
    life.join()
    if life.exitcode:
        raise RuntimeError(f"an undisturbed run ended with exit code {life.exitcode}")
    return time.monotonic() - began


def kill_and_resume(run: Run, *, folder: Path, kills: int, seed: int) -> KillCampaign:
    """Kill a run ``kills`` times, let it finish, and compare it with an undisturbed one.

    A run that finishes before all kills are done is compared as well, and the next one begins in a
    directory of its own, so that every kill hits a process at work.
    """
    draw, moments, began = random.Random(seed), Counter[str](), time.monotonic()
    reference = folder / "whole"
    train_once(run, reference)  # builds the corpus and the shards too
    longest = train_once(run, folder / "timed")
    differences, lives, finished = compare_run_dirs(reference, folder / "timed"), 0, 0
    here = folder / "killed-0"
    while moments.total() < kills and not differences:
        life = _start_process(run, here)
        lives += 1
        life.join(timeout=draw.uniform(0.0, longest))
        if life.exitcode is None and life.pid is not None:
            os.kill(life.pid, signal.SIGKILL)
            life.join()
            moments[_phase_at_kill(RunDir(here))] += 1
        elif life.exitcode:
            differences.append(f"life {lives} ended with exit code {life.exitcode}")
        else:
            longest *= 0.8  # the machine has become quicker: wait less, or no life is ever killed
            differences += compare_run_dirs(reference, here)
            finished += 1
            here = folder / f"killed-{finished}"
    train_once(run, here)
    differences += compare_run_dirs(reference, here)
    seconds = time.monotonic() - began
    return KillCampaign(moments.total(), lives + 1, dict(moments), seconds, tuple(differences))


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
