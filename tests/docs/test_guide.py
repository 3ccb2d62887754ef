"""The guide's commands and snippets run as they stand, page by page, each page in a new folder."""

import re
import shlex
from pathlib import Path

import pytest

from moesaic.cli.main import main

GUIDE = Path(__file__).parents[2] / "docs" / "guide"
PAGES = sorted(p.name for p in GUIDE.glob("*.md") if p.name != "README.md")
BLOCK = re.compile(r"^```(\w+)[ ]?([^\n]*)\n(.*?)^```", re.M | re.S)


def run_command(line, capsys):
    verb, *words = shlex.split(line)
    assert verb == "moesaic", line
    code = 0
    try:
        main(words)
    except SystemExit as end:
        code = end.code
    assert not code, f"{line}\n{capsys.readouterr().err[-2000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_a_page_of_the_guide_runs_as_it_stands(page, tmp_path, data_home, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("lines.txt").write_text("Please open the file number 3\n")
    space, ran = {"__name__": "guide"}, 0
    for kind, about, body in BLOCK.findall((GUIDE / page).read_text(encoding="utf-8")):
        if kind == "yaml":
            Path(about.strip()).write_text(body)
        elif kind == "python" and about.startswith("file="):
            Path(about.removeprefix("file=")).write_text(body)
        elif kind == "python":
            exec(compile(body, page, "exec"), space)
            ran += 1
        elif kind == "console":
            for line in body.splitlines():
                run_command(line.removeprefix("$ "), capsys)
                ran += 1
    assert ran


def test_the_guide_lists_every_page():
    index = (GUIDE / "README.md").read_text()
    assert [p for p in PAGES if f"({p})" not in index] == []
