"""Learning curve: each kept checkpoint is scored once, the last one like the finished run."""

import json
import shutil

import pytest
import torch

from moesaic.checkpoint.reshard import ShardedForm, reshard
from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.errors import CheckpointError
from moesaic.evaluate.harness import EvaluationSettings
from moesaic.evaluate.testset import corpus_testsets
from moesaic.serve.learning_curve import learning_curve
from moesaic.serve.load_model import load
from moesaic.serve.score import score_run
from moesaic.testing.tiny_models import synthetic_run, text_of
from moesaic.train.resume import ResumeLatest
from moesaic.train.run_training import train

pytestmark = pytest.mark.usefixtures("data_home")


@pytest.fixture(scope="module")
def made(data_home, tmp_path_factory):
    """A run of 10 steps with checkpoints at 5 and 10, its corpus and a small test set."""
    assert data_home.is_dir()
    run, path = synthetic_run(steps=10), tmp_path_factory.mktemp("runs") / "curve"
    train(run, path)
    corpus = text_of(run).corpus.open()
    return path, corpus, corpus_testsets(corpus, split="valid", limit=3)


def test_every_checkpoint_is_scored_and_the_last_is_the_run(made):
    path, corpus, tests = made
    curve = learning_curve(path, tests=tests, corpus=corpus, limit=3)
    assert [point["step"] for point in curve["points"]] == [5, 10]
    assert curve["points"][1]["tokens"] > curve["points"][0]["tokens"] > 0
    summary = score_run(path, tests=tests, corpus=corpus, settings=EvaluationSettings(samples=0))
    for name, key in (("model", "points"), ("memory", "baselines"), ("copy", "baselines")):
        found = curve[key][-1]["chrf"] if key == "points" else curve[key][name]
        assert found["score"] == pytest.approx(summary.mean[name]["chrf"].score, abs=0.006)


def test_a_checkpoint_is_loaded_by_its_own_path(made):
    path, *_ = made
    first, last = (load(c) for c in sorted(RunDir(path).checkpoints.glob("step-*")))
    ids = torch.tensor([[5, 6, 7]])
    assert last.logits(ids, source=ids).equal(load(path).logits(ids, source=ids))
    assert not first.logits(ids, source=ids).equal(last.logits(ids, source=ids))


def test_scored_checkpoints_are_not_scored_again(made, tmp_path):
    path, corpus, tests = made
    again = tmp_path / "again"
    shutil.copytree(path, again)
    first = learning_curve(again, tests=tests, corpus=corpus, limit=3)
    shutil.rmtree(RunDir(again).checkpoints / "step-00000005")
    scored = []
    second = learning_curve(again, tests=tests, corpus=corpus, limit=3, on_point=scored.append)
    assert second == first == json.loads(RunDir(again).score_curve.read_text())
    assert scored == []
    other = learning_curve(again, tests=tests[:1], corpus=corpus, limit=3, on_point=scored.append)
    assert [point["step"] for point in other["points"]] == [10]  # other strings: a new curve


def test_sharded_checkpoints_get_the_same_scores_as_full_ones(made, tmp_path):
    path, corpus, tests = made
    cut = tmp_path / "cut"
    shutil.copytree(path, cut)
    RunDir(cut).score_curve.unlink(missing_ok=True)
    root = RunDir(cut).checkpoints
    shutil.rmtree(root)
    reshard(RunDir(path).checkpoints / "step-00000010", root=root, form=ShardedForm(2))
    one = learning_curve(path, tests=tests, corpus=corpus, limit=3)
    other = learning_curve(cut, tests=tests, corpus=corpus, limit=3)
    assert [p["chrf"] for p in other["points"]] == [one["points"][-1]["chrf"]]
    config = synthetic_run(steps=12)
    assert train(config, cut, resume=ResumeLatest()).steps == 12  # and a run goes on from them


def test_a_run_without_checkpoints_is_refused(made, tmp_path):
    path, corpus, tests = made
    bare = tmp_path / "bare"
    shutil.copytree(path, bare)
    shutil.rmtree(RunDir(bare).checkpoints)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        learning_curve(bare, tests=tests, corpus=corpus)


def test_a_retrained_step_is_scored_again(made, tmp_path):
    path, corpus, tests = made
    again = tmp_path / "again"
    shutil.copytree(path, again)
    curve = learning_curve(again, tests=tests, corpus=corpus)
    curve["points"][0]["weights"] = "of an earlier run"
    RunDir(again).score_curve.write_text(json.dumps(curve))
    scored = []
    learning_curve(again, tests=tests, corpus=corpus, on_point=scored.append)
    assert [point["step"] for point in scored] == [5]
