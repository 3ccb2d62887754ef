"""Idle threads sleep whichever door is used, and where it is too late, training says so."""

import os
import subprocess
import sys

import pytest

SHOW = (
    "import os; from moesaic.core.thread_waiting import waiting_advice as a; "
    "print(os.environ['OMP_WAIT_POLICY'], a())"
)


@pytest.mark.parametrize(
    ("first", "given", "expected"),
    [
        ("import moesaic", {}, "PASSIVE "),
        ("import sys; sys.modules['torch'] = sys", {}, "PASSIVE torch was imported before moesaic"),
        ("import moesaic", {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE "),
    ],
)
def test_idle_threads_sleep_unless_torch_or_the_user_came_first(first, given, expected):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | given
    done = subprocess.run(
        [sys.executable, "-c", f"{first}; {SHOW}"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip("\n").startswith(expected)
