"""ARCHITECTURE.md: its snippets run, and its way of a token is the order of the calls of a run."""

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moesaic.cli.main import main

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| \d+ \| `([\w/]+\.py)` \| `([\w.]+)` \|", re.MULTILINE)
# what another recipe than the demo has others for, or another machine
NOT_IN_TINY = {
    *("recipes/demo_recipe.py", "corpus/sources/gettext_catalogues.py"),
    *("corpus/readers/gettext.py", "ops/moe_kernel.py"),
}
SOURCE = str(ROOT / "src" / "moesaic") + os.sep


@contextmanager
def recorded_calls() -> Iterator[dict[tuple[str, str], int]]:
    """The functions of the package that are called, in the order of their first calls."""
    calls: dict[tuple[str, str], int] = {}

    def record(frame, event, argument) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(SOURCE):
            calls.setdefault((code.co_filename.removeprefix(SOURCE), code.co_qualname), len(calls))

    threading.setprofile(record)
    sys.setprofile(record)
    try:
        yield calls
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def test_the_snippets_run():
    space = {"__name__": "architecture"}
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.M | re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "ARCHITECTURE.md", "exec"), space)


def test_the_files_of_a_token_are_called_in_this_order_and_none_twice(tmp_path, monkeypatch):
    rows = ROW.findall(TEXT)
    files = [file for file, _ in rows]
    assert len(files) == len(set(files)) >= 30
    monkeypatch.setenv("MOESAIC_HOME", str(tmp_path / "home"))
    quiet = ("steps=20", "validation.every=0", "log.routing_probe_every=0")
    words = [word for change in quiet for word in ("--set", change)]
    with recorded_calls() as calls, pytest.raises(SystemExit) as end:
        main(["train", "tiny", "--out", str(tmp_path / "run"), "--until", "1", *words])
    assert end.value.code in (None, 0)
    wanted = [row for row in rows if row[0] not in NOT_IN_TINY]
    assert [row for row in wanted if row not in calls] == []
    assert [call for call in calls if call in wanted] == wanted


@pytest.mark.parametrize("file", sorted(NOT_IN_TINY))
def test_a_file_that_this_run_does_not_need_has_the_function(file):
    (name,) = [name for path, name in ROW.findall(TEXT) if path == file]
    source = (ROOT / "src" / "moesaic" / file).read_text(encoding="utf-8")
    assert f"def {name.rpartition('.')[2]}(" in source


def test_what_is_asked_for_is_where_the_table_says():
    section = TEXT.partition("## Where is ...?")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if "`" in line]
    assert len(rows) > 25
    for _, files, names in rows:
        text = "".join(
            (ROOT / "src" / "moesaic" / file).read_text(encoding="utf-8")
            for file in re.findall(r"`([^`]+)`", files)
        )
        for name in re.findall(r"`([^`]+)`", names):
            assert re.search(rf"^(class|def) {name}\b", text, re.MULTILINE), (files, name)
