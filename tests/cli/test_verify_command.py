"""``moesaic verify``: the matrix of plans and the exit code."""

import json
from pathlib import Path

import pytest
from defects import DEFECTS

from moesaic.cli.main import main

OWN = ["verify", "tiny", "--world-size", "2", "--plans", "config", "--steps", "1"]
EXPERT = ["--set", "parallel.plan.expert=2"]


def code(words: list[str]) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        main(words)
    return end.value.code


def test_an_equal_plan_ends_with_0_and_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "matrix.md"
    assert not code([*OWN, *EXPERT, "--out", str(page), "--json"])
    captured = capsys.readouterr()
    value = json.loads(captured.out.splitlines()[-1])
    assert value["summary"] == "1 plan of 2 ranks: each equals one process"
    assert value["plans"][0]["parallel"]["plan"]["expert"] == 2
    assert "model.dim: 64 -> 32" in captured.err.replace("\n", " ")
    assert "| 2 | data 2, expert 2 |" in page.read_text()


def test_a_different_plan_ends_with_1_and_says_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    DEFECTS["aux loss counted once per rank"].seed(monkeypatch)
    assert code([*OWN]) == 1
    assert "loss_balance" in capsys.readouterr().out


def test_a_plan_that_does_not_fit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert code([*OWN, "--set", "parallel.plan.expert=3"]) == 2
    assert "expert 3" in capsys.readouterr().err
