"""README's commands and Python run as they stand, in order, in one new folder."""

import contextlib
import io
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from moesaic.cli.main import main
from moesaic.distributed.forked_ranks import run_on_ranks

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.M | re.S)
HEREDOC = re.compile(r"<<'(\w+)'")


def commands(block):
    """Yield each command of a block of shell, with the text that it reads from the block."""
    lines = iter(block.splitlines())
    for line in lines:
        end = HEREDOC.search(line)
        if end is None:
            yield line
        else:
            text = [line]
            while text[-1] != end[1]:
                text.append(next(lines))
            yield "\n".join(text)


def run_in_shell(command):
    """Other programs and shell syntax."""
    done = subprocess.run(["bash", "-ec", command], capture_output=True, text=True)
    assert not done.returncode, f"{command}\n{done.stderr[-2000:]}"


def run_here(command, monkeypatch, capsys):
    """A moesaic command in this process, which has torch already; ``echo`` and ``>`` as a shell."""
    words = shlex.split(command, comments=True)
    if words[0] == "echo":
        typed = io.TextIOWrapper(io.BytesIO(f"{words[1]}\n".encode()), encoding="utf-8")
        monkeypatch.setattr("sys.stdin", typed)
        words = words[words.index("|") + 1 :]
    output = words[words.index(">") + 1] if ">" in words else os.devnull
    words = words[: words.index(">")] if ">" in words else words
    assert words.pop(0) == "moesaic"
    with (
        open(output, "w") as file,
        contextlib.redirect_stdout(file),
        pytest.raises(SystemExit) as end,
    ):
        main(words)
    assert not end.value.code, f"{command}\n{capsys.readouterr().err[-2000:]}"


def run_on_forked_ranks(command):
    """``torchrun -m moesaic``: torchrun itself has a test in tests/train/test_under_torchrun.py."""
    _, ranks, size, *words = shlex.split(command)
    assert (ranks, words[:2]) == ("--nproc-per-node", ["-m", "moesaic"])
    assert run_on_ranks(int(size), exit_code, words[2:]) == [0] * int(size)


def exit_code(words):
    try:
        main(words)
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.mark.slow
def test_readme_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOESAIC_HOME", str(tmp_path / "home"))
    space, ran = {"__name__": "readme"}, []
    for kind, block in BLOCK.findall(TEXT):
        if kind == "python":
            exec(compile(block, "README.md", "exec"), space)
            continue
        for command in commands(block):
            here = command.startswith(("moesaic ", "echo ")) and "<<" not in command
            ran.append(command)
            if here:
                run_here(command, monkeypatch, capsys)
            elif command.startswith("torchrun "):
                run_on_forked_ranks(command)
            else:
                run_in_shell(command)
    assert len(ran) >= 20
    assert Path("runs/first/report.html").is_file()


def test_readme_says_how_to_install_and_to_activate():
    assert "source .venv/bin/activate" in TEXT
    assert "pip install ." in TEXT
    assert "moesaic" in (ROOT / "Makefile").read_text(encoding="utf-8").partition("demo:")[2][:400]
