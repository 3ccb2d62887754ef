"""The SkyPilot task is YAML, and its commands are for bash."""

import subprocess

import yaml

from distributed.launch_jobs import JOB, assert_starts_the_job, parsed, shell_command
from moesaic.distributed.launchers import SkyPilot

TASK = SkyPilot(accelerator="H100", volume="runs", setup="pip install a\npip install b")


def test_the_task_requests_the_nodes_and_gpus_of_the_job() -> None:
    task = yaml.safe_load(TASK.render(JOB))
    assert (task["name"], task["num_nodes"]) == ("my-run-1", 2)
    assert task["resources"]["accelerators"] == "H100:8"
    assert task["resources"]["job_recovery"]["max_restarts_on_errors"] == 3
    assert task["volumes"] == {"/shared": "runs"}
    assert task["setup"].splitlines() == ["pip install a", "pip install b"]
    assert "volumes" not in yaml.safe_load(TASK.replace(volume="").render(JOB))


def test_the_command_is_parsed_by_bash_and_torchrun() -> None:
    run = yaml.safe_load(TASK.render(JOB))["run"]
    assert subprocess.run(["bash", "-n", "-c", run], check=False).returncode == 0
    script = run.replace('cd "$SHARED"', "").replace("torchrun", "printf '%s\\n'")
    addresses = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_TASK_ID": "sky-7"}
    environment = {"PATH": "/usr/bin:/bin", "SHARED": "/shared", **addresses}
    output = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    arguments = parsed(["torchrun", *output.stdout.splitlines()])
    assert_starts_the_job(arguments, identity="sky-7", endpoint="10.0.0.1:29500")
    assert shell_command(run)[0] == "torchrun"
