"""The forgetting guard: what was not tuned is scored before and after, and is in the report."""

import json

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.run_record import adopt_files
from moesaic.checkpoint.safetensors_io import read_tensors, write_tensors
from moesaic.cli.evaluated_run import EvaluatedRun
from moesaic.cli.forgetting_scores import write_forgetting
from moesaic.evaluate.harness import EvaluationSettings
from moesaic.model.beam_search import Greedy
from moesaic.optim.lr_schedule import WSD
from moesaic.recipes.lookup import warm_start
from moesaic.report.html_report import write_report
from moesaic.testing.tiny_models import change_text, synthetic_run
from moesaic.train.run_training import train
from moesaic.train.training_hooks import no_progress


def guarded(path):
    evaluated, settings = EvaluatedRun.open(path), EvaluationSettings(resamples=20)
    return write_forgetting(evaluated, limit=4, search=Greedy(), settings=settings)


def test_directions_that_were_not_tuned_are_scored_before_and_after(data_home, tmp_path):
    init, out = RunDir(tmp_path / "init"), RunDir(tmp_path / "tuned")
    train(synthetic_run(steps=1, schedule=WSD()), init.path, progress=no_progress)
    run = warm_start(str(init.path), changes=["steps=1", "schedule.warmup=0"])
    train(change_text(run, languages=("eng_Latn", "qaa_Latn")), out.path, progress=no_progress)
    assert guarded(init.path) is None
    assert not init.forgetting.exists()
    weights = read_tensors(init.model)  # of a model that forgot nothing
    write_tensors(out.model, tensors=weights)
    adopt_files(out)
    assert guarded(out.path).startswith("0 of ")
    found = json.loads(out.forgetting.read_text())
    tuned = {("eng_Latn", "qaa_Latn"), ("qaa_Latn", "eng_Latn")}
    scored = {(r["source"], r["target"]) for r in found["languages"].values()}
    assert scored
    assert not scored & tuned
    for result in found["languages"].values():
        assert result["model"]["chrf"] == result["before"]["chrf"]
        assert result["differences"]["before"]["chrf"]["difference"] == 0
    page = write_report(out.path).read_text()
    assert "What was not tuned" in page
    assert "could not be made" not in page
    assert "What was not tuned" not in write_report(init.path).read_text()
    init.model.unlink()
    assert "not scored" in guarded(out.path)
