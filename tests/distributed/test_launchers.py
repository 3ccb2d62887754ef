"""The job and the torchrun script, parsed by torchrun's own parser."""

import os
import subprocess

import pytest

from distributed.launch_jobs import COMMAND, JOB, assert_starts_the_job, parsed, shell_command
from moesaic.core.errors import ConfigError
from moesaic.distributed import launchers
from moesaic.distributed.launchers import LaunchJob, Torchrun


def test_torchrun_parses_the_command() -> None:
    arguments = parsed(shell_command(Torchrun().render(JOB)))
    head = "${HEAD:?set HEAD to the name of the first node}:29500"
    assert_starts_the_job(arguments, identity="my-run-1", endpoint=head)


def _run(text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in which torchrun is ``printf``, a word a line."""
    script = text.replace("exec torchrun", "exec printf '%s\\n'")
    return subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"], **environment},
    )


def test_the_script_requires_the_first_node_of_a_multi_node_job() -> None:
    without = _run(Torchrun().render(JOB))
    assert without.returncode
    assert "set HEAD to the name of the first node" in without.stderr
    with_it = _run(Torchrun().render(JOB), HEAD="node-a").stdout.splitlines()
    assert "--rdzv-endpoint=node-a:29500" in with_it
    assert with_it[-len(COMMAND) :] == list(COMMAND), "no word may be split or expanded"
    alone = _run(Torchrun().render(JOB.replace(nodes=1)))
    assert "--rdzv-endpoint=localhost:29500" in alone.stdout


@pytest.mark.parametrize("field", ["nodes", "gpus_per_node"])
def test_a_job_without_nodes_or_gpus_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}: found 0, expected at least 1"):
        JOB.replace(**{field: 0})


def test_min_nodes_may_not_exceed_nodes() -> None:
    with pytest.raises(ConfigError, match="min_nodes=3 must be at most nodes=2"):
        JOB.replace(min_nodes=3)
    assert not JOB.replace(min_nodes=2).is_elastic


def test_the_label_is_a_name_that_every_system_accepts() -> None:
    names = ["My run_1", "50-languages", "é", "x" * 60, "--a--"]
    labels = [JOB.replace(name=name).label for name in names]
    assert labels == ["my-run-1", "run-50-languages", "run", "x" * 40, "a"]


def test_an_older_torchrun_gets_no_shutdown_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = LaunchJob(name="a", command=COMMAND, nodes=1, gpus_per_node=1)
    own = launchers.torchrun_command(
        job, rdzv_endpoint="a:1", rdzv_id="b", shutdown_timeout_s=99
    ).torchrun_args
    parser = launchers.get_args_parser()
    knows = "--shutdown-timeout" in parser.format_help()
    assert ("--shutdown-timeout=99" in own) == knows
    parser.format_help = lambda: ""
    monkeypatch.setattr(launchers, "get_args_parser", lambda: parser)
    own = launchers.torchrun_command(
        job, rdzv_endpoint="a:1", rdzv_id="b", shutdown_timeout_s=99
    ).torchrun_args
    assert not [word for word in own if "shutdown" in word]
