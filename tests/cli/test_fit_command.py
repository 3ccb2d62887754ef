"""``moesaic fit`` and ``moesaic plan --budget``: laws of one's own runs, and of papers."""

import json
from pathlib import Path

import pytest

from moesaic.cli.main import main
from moesaic.model.parameter_flop_count import count_parameters
from moesaic.planner.scaling_laws import ChinchillaLaw
from moesaic.recipes.lookup import find_recipe

OURS = ChinchillaLaw(1.2, 90.0, 0.31, 240.0, 0.35)


def result(words, capsys):
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return end.value.code or 0, capsys.readouterr()


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Run directories as training leaves them: a config and metrics, of a known law."""
    found = []
    for dim in (16, 32, 64):
        config = find_recipe("tiny", changes=[f"model.dim={dim}"])
        entries = count_parameters(config.model).entries
        size = sum(e.size * e.active_fraction for e in entries if e.kind != "embedding")
        for tokens in (1e6, 4e6, 16e6):
            run = tmp_path / f"{dim}-{tokens:g}"
            run.mkdir()
            (run / "config.yaml").write_text(config.to_yaml())
            row = {"step": 9, "train/tokens": tokens, "valid/loss": OURS.loss(size, tokens=tokens)}
            (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
            found.append(run)
    return found


def test_the_law_of_runs_is_fitted_with_intervals_and_an_error_on_runs_not_seen(runs, capsys):
    words = ["fit", *runs, "--resamples", 4, "--budget", 1e14, "--json"]
    code, printed = result(words, capsys)
    found = json.loads(printed.out)
    assert code == 0
    assert found["law"]["token_exponent"] == pytest.approx(0.35, rel=0.05)
    assert found["held_out_error"] < 0.01
    assert set(found["intervals"]) == set(found["law"])
    optimum = found["optimum"]
    assert 6 * optimum["parameters"] * optimum["tokens"] == pytest.approx(1e14)


def test_runs_without_validation_and_too_few_runs_are_refused(runs, capsys):
    code, printed = result(["fit", *runs[:3]], capsys)
    assert code == 2
    assert "expected at least 6" in printed.err.replace("\n", " ")
    (runs[0] / "metrics.jsonl").write_text('{"step": 1, "train/tokens": 3}\n')
    code, printed = result(["fit", *runs], capsys)
    assert code == 2
    assert "no valid/loss" in printed.err.replace("\n", " ")


def test_a_budget_is_divided_by_the_laws_of_papers(capsys):
    code, printed = result(["plan", "--budget", "1e21", "--json"], capsys)
    assert code == 0
    assert {value["paper"] for value in json.loads(printed.out)["values"]} >= {"2507.17702"}
    assert result(["plan", "--budget", "1e21"], capsys)[0] == 0
    assert result(["plan", "--budget", "10"], capsys)[0] == 2
    code, printed = result(["plan", "tiny"], capsys)
    assert code == 2
    assert "--gpus N is missing" in printed.err.replace("\n", " ")
