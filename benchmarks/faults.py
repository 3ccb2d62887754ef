"""Fault injection: ranks that are killed, stopped, raise or loop, at every point of a run.

Most jobs are forked ranks that use a store as under torchrun; some are started and restarted by
torchrun itself. After each fault the others must end in time and name the rank and the collective;
the run must resume and end like a run without faults, bit for bit. Last, a run of four ranks
resumes with two, which sum in another order: there the greatest difference of a weight is measured.

    python benchmarks/faults.py --faults 108
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from compare_runs import compare_run_dirs
from fault_trials import (
    Fault,
    FaultInjection,
    FaultResult,
    max_shutdown_s,
    run_fault_trials,
    run_job,
    sample_faults,
)
from support import write_result

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.safetensors_io import read_tensors
from moesaic.moe.auxiliary_losses import SwitchBalance
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.testing.tiny_models import synthetic_run, tiny_model_config
from moesaic.train.resume import ResumeLatest
from moesaic.train.run import CheckpointConfig, Run
from moesaic.train.run_training import train
from moesaic.train.training_hooks import no_progress

TIMEOUT_S = {2: 4.0, 4: 6.0, 8: 12.0}  # two cores, which others may use too
TORCHRUN = (  # one an attempt; the last attempt has none
    Fault("kill", "collective", rank=1, after=3),
    Fault("exception", "between steps", rank=0, after=2),
    Fault("loop", "forward", rank=1, after=3),
    Fault("kill", "save", rank=0, after=2),
)


def make_run(world: int, *, steps: int = 30) -> Run:
    """Return a run with dropout (so it depends on random states) that saves at every other step."""
    moe = MoE(experts=4, select=TopK(k=2), balance=(SwitchBalance(),))
    model = tiny_model_config(moe=moe).replace(vocab_size=400, dropout=0.1)
    return synthetic_run(
        model=model,
        steps=steps,
        checkpoint=CheckpointConfig(every=2),
        collective_timeout_s=TIMEOUT_S[world],
        name="faulty",
    )


def forked(folder: Path, *, world: int, faults: int, seed: int) -> dict[str, Any]:
    """Run the fault trials of one number of forked ranks."""
    run = make_run(world)
    drawn = sample_faults(faults, world_size=world, seed=seed)
    result = run_fault_trials(run, folder=folder / f"of-{world}", world_size=world, faults=drawn)
    waits = [trial.seconds for trial in result.trials if trial.fault.kind in ("stop", "loop")]
    quick = [trial.seconds for trial in result.trials if trial.fault.kind not in ("stop", "loop")]
    found = {
        "ranks": world,
        "faults": len(result.trials),
        "wrong": result.problems,
        "differences": list(result.differences),
        "runs_compared": result.compared,
        "job_runs": result.job_runs,
        "collective_timeout_s": run.collective_timeout_s,
        "longest_s": {"dies": round(max(quick), 2), "hangs": round(max(waits), 2)},
        "allowed_s": round(max_shutdown_s(run), 1),
        "seconds": round(result.seconds),
        "by_kind_and_point": _counted(result),
        "sentences": [trial.sentence for trial in result.trials[:: max(1, faults // 6)]],
    }
    print(json.dumps(found, indent=1), flush=True)
    return found


def _counted(result: FaultResult) -> dict[str, int]:
    return dict(
        sorted(
            Counter(f"{trial.fault.kind}, {trial.fault.point}" for trial in result.trials).items()
        )
    )


def under_torchrun(folder: Path) -> dict[str, Any]:
    """Run two ranks under torchrun, which restarts them after each fault of ``TORCHRUN``."""
    run, start = make_run(2), time.monotonic()
    whole = run_job(run, folder / "fault-free", world_size=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--max-restarts={len(TORCHRUN)}", "--monitor-interval=0.1"]
    command += [__file__, "--as-rank", str(folder / "torchrun")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    differences = (
        compare_run_dirs(folder / "fault-free", folder / "torchrun") if not done.returncode else []
    )
    if done.returncode or not whole.finished:
        differences = [done.stderr[-2000:]]
    named = re.findall(r"LostRankError: (rank \d .*)", done.stderr)
    wrong = [
        f"{fault}: not named"
        for fault in TORCHRUN
        if not any(sentence.startswith(f"rank {fault.rank} ") for sentence in named)
    ]
    found = {
        "ranks": 2,
        "faults": len(TORCHRUN),
        "wrong": wrong,
        "differences": differences,
        "seconds": round(time.monotonic() - start),
        "sentences": sorted({sentence.partition(". The last checkpoint")[0] for sentence in named}),
    }
    print(json.dumps(found, indent=1), flush=True)
    return found


def run_rank(out: Path) -> None:
    """Run as one rank under torchrun, with the fault of this attempt."""
    torch.set_num_threads(1)
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    hooks = ()
    if attempt < len(TORCHRUN):
        stamp = out.with_name(f"injected-{attempt}")
        hooks = (FaultInjection(TORCHRUN[attempt], stamp=stamp, rank=int(os.environ["RANK"])),)
    train(make_run(2), out, resume=ResumeLatest(), hooks=hooks, progress=no_progress)


def with_fewer_ranks(folder: Path) -> dict[str, Any]:
    """Kill one of four ranks, and resume with two."""
    run, here = make_run(4), folder / "fewer"
    whole = run_job(run, folder / "four", world_size=4)
    job_run = run_job(run, here, world_size=4, fault=Fault("kill", "collective", rank=3, after=11))
    resumed = run_job(run, here, world_size=2)
    weights = [read_tensors(RunDir(path).model) for path in (folder / "four", here)]
    greatest = max(float((weights[0][n] - weights[1][n]).abs().max()) for n in weights[0])
    lost = [list(v.ranks) for v in job_run.reports.values()]
    ended = whole.finished and resumed.finished and lost and all(ranks == [3] for ranks in lost)
    found = {"ranks": "4, then 2", "greatest_difference_of_a_weight": greatest}
    found |= {"wrong": [] if ended else [str(lost), str(resumed.stderr)]}
    print(json.dumps(found, indent=1), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faults", type=int, default=108)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here / "results" / "faults.json")
    options = parser.parse_args()
    if options.as_rank is not None:
        return run_rank(options.as_rank)
    torch.set_num_threads(1)
    shares = {2: 0.55, 4: 0.3, 8: 0.15}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["MOESAIC_HOME"] = str(folder / "home")
        counts = {world: round(options.faults * share) for world, share in shares.items()}
        parts = [
            forked(folder, world=world, faults=count, seed=options.seed + world)
            for world, count in counts.items()
        ]
        launched = under_torchrun(folder)
        fewer = with_fewer_ranks(folder)
    wrong = [why for part in (*parts, launched, fewer) for why in part["wrong"]]
    differences = [why for part in (*parts, launched) for why in part["differences"]]
    total = sum(part["faults"] for part in (*parts, launched))
    question = "does a job stop in time, name the lost rank and resume without a difference?"
    summary = {"question": question, "faults": total, "wrong": wrong, "differences": differences}
    summary |= {"forked": parts, "torchrun": launched, "fewer_ranks": fewer, "seed": options.seed}
    summary |= {"injected_by_torchrun": [asdict(fault) for fault in TORCHRUN]}
    write_result(options.out, summary)
    _table(parts, launched)
    return sys.exit(1 if wrong or differences else 0)


def _table(parts: list[dict[str, Any]], launched: dict[str, Any]) -> None:
    print("\n| ranks | faults | wrong | longest when one dies | when one hangs | timeout |")
    print("| --: | --: | --: | --: | --: | --: |")
    for part in parts:
        dies, hangs = part["longest_s"]["dies"], part["longest_s"]["hangs"]
        bad = len(part["wrong"]) + len(part["differences"])
        row = f"{part['ranks']} | {part['faults']} | {bad} | {dies} s | {hangs} s"
        print(f"| {row} | {part['collective_timeout_s']} s |")
    bad = len(launched["wrong"]) + len(launched["differences"])
    print(f"| 2, torchrun | {launched['faults']} | {bad} | | | {TIMEOUT_S[2]} s |")


if __name__ == "__main__":
    main()
