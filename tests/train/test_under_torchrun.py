"""Two ranks under torchrun: one is killed, both restart and end as a single rank does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from compare_runs import metric_rows

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.safetensors_io import read_tensors
from moesaic.testing.tiny_models import synthetic_run
from moesaic.train.run import CheckpointConfig
from moesaic.train.run_training import train
from moesaic.train.training_hooks import no_progress

SCRIPT = """
import os, sys
import torch
from moesaic.testing.tiny_models import synthetic_run
from moesaic.train.training_hooks import Hook
from moesaic.train.run_training import train
from moesaic.train.resume import ResumeLatest
from moesaic.train.run import CheckpointConfig

torch.set_num_threads(1)

class Die(Hook):
    def after_step(self, trainer, report):
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and trainer.world.rank == 1 and report.step == 5:
            os._exit(9)

run = synthetic_run(steps=8, checkpoint=CheckpointConfig(every=3))
train(run, sys.argv[1], resume=ResumeLatest(), hooks=[Die()])
"""


@pytest.mark.slow
def test_a_killed_rank_is_restarted_and_training_ends_as_on_one_rank(
    data_home: Path, tmp_path: Path
) -> None:
    run = synthetic_run(steps=8, checkpoint=CheckpointConfig(every=3))
    train(run, tmp_path / "one", progress=no_progress)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--max-restarts=1", "--monitor-interval=0.1", str(script), str(tmp_path / "two")]
    environment = os.environ | {"MOESAIC_HOME": str(data_home), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=180, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming after step 3" in done.stderr
    lost = "rank 1 did not reach all_reduce #"
    assert lost in done.stderr, "rank 0 must say whom it waited for"
    assert "has exited without an error message" in done.stderr
    one, two = (read_tensors(RunDir(tmp_path / name).model) for name in ("one", "two"))
    for name, weight in one.items():
        assert float((two[name] - weight).abs().max()) < 1e-4, name
    for here, there in zip(
        metric_rows(tmp_path / "one"), metric_rows(tmp_path / "two"), strict=True
    ):
        assert there == pytest.approx(here, rel=1e-4, abs=1e-6)
