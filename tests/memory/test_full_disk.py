"""A disk tier on a real file system that becomes full stops a run with a checkpoint."""

import subprocess
import sys
from pathlib import Path

import pytest

MOUNT = "mount -t tmpfs -o size=8m none {disk} && "


def test_a_run_on_a_full_file_system_stops_with_a_checkpoint_that_resumes(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount, program = MOUNT.format(disk=disk), Path(__file__).with_name("small_disk.py")
    own = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    try:
        subprocess.run([*own, mount + "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here without privileges")
    call = f"{mount} exec {sys.executable} {program} {tmp_path}"
    done = subprocess.run([*own, call], check=True, capture_output=True, text=True)
    step, resumes_equally, message = done.stdout.splitlines()
    assert int(step) >= 1
    assert resumes_equally == "True"
    assert message.startswith(str(disk))
    assert "no room for" in message
