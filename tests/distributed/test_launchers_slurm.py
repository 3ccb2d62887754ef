"""The sbatch script, run by bash with stand-ins for Slurm's commands."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from distributed.launch_jobs import JOB, assert_starts_the_job, parsed, shell_command
from moesaic.core.errors import ConfigError
from moesaic.distributed.launchers import Slurm

STAND_INS = {
    "scontrol": (
        'echo "scontrol $*" >> output; [[ $1 == show ]] && printf "node-a\\nnode-b\\n"; true'
    ),
    "scancel": 'echo "scancel $*" >> output; kill -TERM "$(cat step)"',
    "srun": (
        'echo "$$" > step; printf "%s\\n" "$@" > words; trap "exit 143" TERM; '
        '[[ -n ${HANG:-} ]] && while true; do sleep 0.05; done; exit "${CODE:-0}"'
    ),
}


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A directory whose ``bin`` has Slurm's commands."""
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    return tmp_path


def _start(cluster: Path, **environment: str) -> subprocess.Popen[bytes]:
    path = f"{cluster / 'bin'}:{os.environ['PATH']}"
    known = {"PATH": path, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[a-b]"}
    return subprocess.Popen(
        ["bash", "-c", Slurm().render(JOB)], cwd=cluster, env=known | environment
    )


def test_torchrun_parses_the_command() -> None:
    arguments = parsed(shell_command(Slurm().render(JOB)))
    identity = "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
    assert_starts_the_job(arguments, identity=identity, endpoint="$head:29500")


def test_the_rendezvous_is_the_first_node_and_a_failure_fails_the_job(cluster: Path) -> None:
    assert _start(cluster, CODE="5").wait(20) == 5
    words = (cluster / "words").read_text().splitlines()
    assert "--rdzv-endpoint=node-a:29500" in words
    assert "--rdzv-id=7-0" in words
    assert "requeue" not in (cluster / "output").read_text()


def test_before_the_time_limit_it_stops_the_run_and_requeues(cluster: Path) -> None:
    script = _start(cluster, HANG="yes")
    late = time.monotonic() + 20
    while not (cluster / "words").is_file() and time.monotonic() < late:
        time.sleep(0.01)
    script.send_signal(signal.SIGTERM)
    assert script.wait(20) == 143
    output = (cluster / "output").read_text().splitlines()
    assert output[-2:] == ["scancel --signal=TERM 7", "scontrol requeue 7"]


def test_options_become_sbatch_directives() -> None:
    own = Slurm(time="2-00:00:00", save_s=120, partition="gpu", extra_options=("--qos=long",))
    lines = own.render(JOB).splitlines()
    for option in ("--time=2-00:00:00", "--signal=B:TERM@120", "--partition=gpu", "--qos=long"):
        assert f"#SBATCH {option}" in lines
    first_command = next(i for i, line in enumerate(lines) if line[:1] not in ("#", ""))
    assert not [line for line in lines[first_command:] if line.startswith("#SBATCH")]


@pytest.mark.parametrize("wrong", [{"time": "a day"}, {"more": ("rm -rf",)}, {"save_s": 0}])
def test_a_wrong_setting_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Slurm(**wrong)


def test_an_elastic_job_survives_a_lost_node() -> None:
    text = Slurm().render(JOB.replace(min_nodes=1))
    assert "#SBATCH --no-kill" in text
    assert "--kill-on-bad-exit=0" in text
    assert parsed(shell_command(text)).nnodes == "1:2"
    assert "--kill-on-bad-exit=1" in Slurm().render(JOB)
