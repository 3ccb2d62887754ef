"""Compare the directories of two finished runs, bit for bit."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moesaic.checkpoint.full_checkpoint import load_checkpoint
from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.snapshot import Snapshot

TIMING_METRICS = ("perf/", "time/", "mem/")  # metrics of speed and memory


def compare_run_dirs(left: Path, right: Path) -> list[str]:
    """Return how two finished runs differ; an empty list means bit for bit equal.

    Weights, optimizer, random states, running sums, data position, and metrics except timings.
    """
    one, other = (load_checkpoint(RunDir(path).checkpoints) for path in (left, right))
    found = list(_snapshot_differences(one, other))
    if metric_rows(left) != metric_rows(right):
        found.append("metrics.jsonl")
    if RunDir(left).model.read_bytes() != RunDir(right).model.read_bytes():
        found.append("model.safetensors")
    if RunDir(left).usage.read_bytes() != RunDir(right).usage.read_bytes():
        found.append("usage.json")
    return [f"{right.name}: {difference}" for difference in found]


def metric_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics of a run directory without those that depend on the clock."""
    lines = RunDir(path).metrics.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if not k.startswith(TIMING_METRICS)} for row in rows]


def _snapshot_differences(one: Snapshot, other: Snapshot) -> Iterator[str]:
    if (one.step, one.state) != (other.step, other.state):
        yield f"state at step {one.step} and {other.step}"
    for name in sorted(one.files.keys() | other.files.keys()):
        mine, theirs = one.files.get(name, {}), other.files.get(name, {})
        for key in sorted(mine.keys() | theirs.keys()):
            if key not in mine or key not in theirs or not torch.equal(mine[key], theirs[key]):
                yield f"{name}: {key}"
