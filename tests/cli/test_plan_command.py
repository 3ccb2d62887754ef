import json
from pathlib import Path

import pytest
from plan_cases import hand_made_step

from moesaic.cli.main import main
from moesaic.planner import plan_report
from moesaic.planner.machine import find_machine


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is not measured on fake tensors: its numbers are made by hand."""
    monkeypatch.setattr(plan_report, "step_cost", lambda _: hand_made_step())


def _run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = 0
    try:
        main(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.usefixtures("measured")
def test_plan_prints_plans_with_bytes_time_and_what_the_others_lose(capsys):
    words = ("plan", "tiny", "--gpus", "8", "--batch", "64x32+32", "--tokens", "1e9", "--json")
    code, out, _ = _run(capsys, *words)
    assert code == 0
    found = json.loads(out.splitlines()[-1])
    first, *others = found["plans"]
    parts = first["seconds"]
    waits = [parts[k] for k in ("compute", "communication", "transfers")]
    total = sum(sum(w.values()) for w in waits) + parts["update"] + parts["bubble"]
    assert parts["step"] == pytest.approx(total)
    assert first["tokens_per_second"] == pytest.approx(64 * 64 / parts["step"])
    assert first["budget"]["hours"] == pytest.approx(1e9 / first["tokens_per_second"] / 3600)
    assert sum(first["bytes"]["DeviceMemory"].values()) <= found["limits"]["DeviceMemory"]
    assert all("slower" in other for other in others)
    assert found["certificate"]["holds"]


@pytest.mark.usefixtures("measured")
def test_the_table_of_plans_fits_a_terminal(capsys):
    code, out, _ = _run(capsys, "plan", "tiny", "--gpus", "64", "--batch", "64x32+32")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 120
    assert "64 devices" in out


@pytest.mark.usefixtures("measured")
def test_a_budget_that_no_plan_meets_is_answered_with_the_nearest_plan(capsys):
    words = ("plan", "tiny", "--gpus", "2", "--batch", "64x32+32", "--memory", "10KB")
    code, _, err = _run(capsys, *words)
    assert code == 2
    assert "The nearest is" in err
    assert "are missing" in err
    assert "of device memory per rank" in err


@pytest.mark.usefixtures("measured")
def test_max_params_has_a_row_for_each_combination_of_the_paper(capsys):
    words = ("plan", "tiny", "--gpus", "8", "--batch", "64x32+32", "--max-params", "--json")
    code, out, _ = _run(capsys, *words, "--memory", "8MB", "--host", "1GB")
    assert code == 0
    rows = {row["combination"]: row for row in json.loads(out.splitlines()[-1])["rows"]}
    assert list(rows) == ["E", "E+D", "E+Z", "E+D+M", "E+Z+M", "E+Z-Offload+M"]
    assert rows["E"]["parameters"] > rows["E+D"]["parameters"] > 0
    assert rows["E+Z-Offload+M"]["parameters"] > rows["E"]["parameters"]


def test_a_machine_file_that_lacks_a_number_ends_plan_with_its_name(capsys, tmp_path: Path):
    file = tmp_path / "machine.yaml"
    text = find_machine("h100").to_yaml()
    file.write_text(text[: text.index("update:")] + text[text.index("contended:") :])
    code, _, err = _run(capsys, "plan", "tiny", "--gpus", "2", "--machine", str(file))
    assert code == 2
    assert f"{file}: update: missing" in err


def test_a_batch_is_given_as_rows_and_tokens(capsys):
    code, _, err = _run(capsys, "plan", "tiny", "--gpus", "2", "--batch", "lots")
    assert code == 2
    assert "1024x512+512" in err
