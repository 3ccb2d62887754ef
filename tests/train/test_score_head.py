"""Scores of a run with another head: `eval` prints them, translation refuses the run."""

import json

import numpy as np
import pytest

from moesaic.checkpoint.run_directory import RunDir
from moesaic.cli.main import main
from moesaic.core.errors import CheckpointError
from moesaic.evaluate.head_scores import RowSums, score_rows
from moesaic.recipes.lookup import find_recipe
from moesaic.serve.open_run import open_run
from moesaic.train.run_training import train
from moesaic.train.training_hooks import no_progress


def test_scores_are_means_over_predictions_with_intervals_by_label() -> None:
    rows = RowSums(
        np.array([[2.0, 6.0, 1.0]]), np.array([1, 3, 1]), {"class": np.array(["a", "b", "a"])}
    )
    found = score_rows(rows, names=("loss",), split="test", resamples=200).scores["loss"]
    assert found["all"].score == pytest.approx(9 / 5)
    assert found["class/a"].score == 1.5
    assert 1.0 <= found["all"].low <= found["all"].score <= found["all"].high <= 2.0
    assert found["class/b"].low == found["class/b"].high == 2.0


def test_eval_scores_a_run_of_another_head_and_translation_refuses_it(tmp_path, capsys) -> None:
    changes = [
        *("data.source.source=SyntheticSeries(number=1, length=100)", "data.source.context=12"),
        *("data.source.future=4", "data.batch_rows=6", "model.head.horizons=[1, 4]"),
        *("model.dim=16", "model.attention.heads=2", "model.decoder.layers=1", "steps=3"),
    ]
    run = find_recipe("time-moe", changes=changes)
    out = tmp_path / "run"
    train(run, out, progress=no_progress)
    with pytest.raises(SystemExit) as end:
        main(["eval", str(out), "--pairs", "mine.tsv"])
    assert end.value.code == 2
    assert "--pairs does not fit" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit) as end:
        main(["eval", str(out), "--json"])
    assert not end.value.code
    found = json.loads(capsys.readouterr().out)
    assert json.loads(RunDir(out).head_scores.read_text())["scores"] == found["scores"]
    page = RunDir(out).report.read_text()
    assert "Scores of the test split" in page
    for group in {label.partition("/")[0] for label in found["scores"]["mse"]} - {"all"}:
        assert f"Scores by {group}" in page
    assert list(found["scores"]) == ["loss", "mse", "mae"]
    every = found["scores"]["mse"]["all"]
    assert every["low"] <= every["score"] <= every["high"]
    assert len(found["scores"]["mse"]) > 1  # by label too
    with pytest.raises(CheckpointError, match="Regression, which writes no text"):
        open_run(out)
