"""The process of a command: its streams, and Ctrl-C before the command's own code runs."""

import os
import shlex
import signal
import subprocess
import sys

import pytest

from moesaic.cli.interrupts import InterruptHandler

MOESAIC = f"{sys.executable} -m moesaic"


@pytest.mark.parametrize(
    ("shell", "message"),
    [
        ("trian > /dev/full", "unknown command"),
        ("--version > /dev/full", "no space left"),
        ("--version >&-", "standard output: bad file descriptor"),
        ("train --help > /dev/full", "no space left"),
    ],
)
def test_an_output_that_fails_is_a_sentence(shell, message):
    done = subprocess.run(["bash", "-c", f"{MOESAIC} {shell}"], capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_messages_are_utf8_whatever_the_locale():
    environment = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "moesaic", "Ἀγά"], env=environment, capture_output=True
    )
    assert "Ἀγά" in done.stderr.decode("utf-8")


def test_a_closed_input_is_empty_and_closed_messages_are_lost():
    code = (
        "import sys; from moesaic.cli.standard_streams import prepare_standard_streams\n"
        "prepare_standard_streams(); sys.stderr.write('lost'); print(repr(sys.stdin.read()))"
    )
    shell = f"{sys.executable} -c {shlex.quote(code)} <&- 2>&-"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "''\n", "")


def test_a_reader_that_has_gone_is_no_error():
    done = subprocess.run(
        ["bash", "-c", f"{MOESAIC} train --help | true"], capture_output=True, text=True
    )
    assert done.stderr == ""


def test_the_first_ctrl_c_of_a_command_raises_and_its_repeats_do_not():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with InterruptHandler(owns_process=False, has_begun=lambda: True) as ctrl_c:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            for _ in range(40):
                signal.raise_signal(signal.SIGINT)
            assert ctrl_c.received
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_a_command_is_imported_ends_with_130():
    code = (
        "import os, signal, sys; import moesaic.__main__ as entry; import moesaic.cli.main as m\n"
        "sys.argv = ['moesaic', 'explain', 'tiny']\n"
        "signal.signal(2, signal.default_int_handler)\n"
        "m._check_names = lambda *_: os.kill(os.getpid(), 2)\n"
        "entry.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
