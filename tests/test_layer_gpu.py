"""The benchmark of the layer on a GPU runs from end to end, tiny and in Triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moesaic.ops.triton.tiles import parse_table

ROOT = Path(__file__).parents[1]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "layer_gpu.py"), *options]
    # as on the day: nothing installed, the package beside the script
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT
    )


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_benchmark_runs_as_a_dry_run_and_leaves_a_whole_result(tmp_path):
    done = run("--dry-run", "--out", str(tmp_path), "--only", "moe_kernel", "table", "tune")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "layer_gpu.json").read_text())
    assert found["moe_kernel"]["right"]
    (row,) = found["table"]
    assert row["agree"]["ours"] < 1e-5
    assert row["both"]["ours"] == {}  # no times from an interpreter
    assert parse_table(json.loads((tmp_path / "tuned.json").read_text()))
    assert (tmp_path / "log").read_text().count("==") == 3
