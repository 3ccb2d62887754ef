"""Small systems at tiny size on synthetic data: they resume, report, and run on two ranks."""

from pathlib import Path

import pytest
from compare_runs import compare_run_dirs

from moesaic.checkpoint.run_directory import RunDir
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess, World
from moesaic.recipes.lookup import find_recipe
from moesaic.report.html_report import write_report
from moesaic.testing.tiny_models import SMALL_SYNTHETIC_CORPUS
from moesaic.train.corpus_source import BuiltCorpus
from moesaic.train.resume import ResumeLatest
from moesaic.train.run import CheckpointConfig, LogConfig, Run, ValidationConfig
from moesaic.train.run_training import make_trainer, train
from moesaic.train.text_data import TextData
from moesaic.train.training_data import Preparation
from moesaic.train.training_hooks import no_progress

pytestmark = pytest.mark.usefixtures("data_home")

SMALLER = {
    "time-moe": [
        "data.source.source=SyntheticSeries(number=1, length=100)",
        "data.source.context=12",
        "data.source.future=4",
        "data.batch_rows=6",
        "model.head.horizons=[1, 4]",
    ],
    "dit-moe": ["data.source.source=SyntheticBars(number=60)", "data.batch_rows=10"],
    "dmoerm": [],
    "vlm2vec": [],
    "jiuzhang": [],
}
TEXT = [
    "data.tokenizer.vocab_size=400",
    "data.loader.batch_tokens=256",
    "data.loader.bucket_window=64",
    "model.vocab_size=400",
]


def tiny(name: str) -> Run:
    """Return the recipe on synthetic data, with one layer and six steps."""
    run = find_recipe(name)
    if isinstance(run.data, TextData):
        languages = ("eng_Latn", "qaa_Latn", "qab_Cyrl") if name != "dmoerm" else ("eng_Latn",)
        corpus = BuiltCorpus(recipe=SMALL_SYNTHETIC_CORPUS)
        run = run.replace(data=run.data.replace(corpus=corpus, languages=languages))
        run = run.override([*TEXT, "data.tokenizer.sample_lines=1000"])
    layers = ["model.decoder.layers=1", "model.decoder.moe_every=1", "model.dim=16"]
    return run.override([*SMALLER[name], *layers, "model.attention.heads=2"]).replace(
        steps=6,
        checkpoint=CheckpointConfig(every=3),
        validation=ValidationConfig(every=3, rows=4),
        log=LogConfig(every=1, routing_stats_every=3),
    )


@pytest.mark.parametrize("name", SMALLER)
def test_a_small_system_resumes_to_the_same_end_and_reports(name: str, tmp_path: Path) -> None:
    run = tiny(name)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = train(run, whole, progress=no_progress)
    train(run, parts, until=3, progress=no_progress)
    train(run, parts, resume=ResumeLatest(), progress=no_progress)
    assert compare_run_dirs(whole, parts) == []
    assert result.metrics["train/loss"] > 0
    assert result.metrics["valid/loss"] > 0
    assert "<svg" in write_report(whole).read_text()


def _losses(folder: Path, name: str, world: World) -> list[float]:
    run = tiny(name)
    place = Preparation(RunDir(folder), world, lambda _: None)
    trainer = make_trainer(run, prepared=run.data.prepare(place), world=world)
    reports = [trainer.train_step() for _ in range(3)]
    return [float(report.result.sums.terms["objective"]) for report in reports]


def _all_on_two(folder: Path) -> dict[str, list[float]]:
    return {name: _losses(folder / name, name, ProcessGroupWorld()) for name in SMALLER}


def test_two_ranks_take_the_steps_of_one(tmp_path: Path) -> None:
    for name in SMALLER:
        (tmp_path / name).mkdir()
    alone = {name: _losses(tmp_path / name, name, SingleProcess()) for name in SMALLER}
    first, second = run_on_ranks(2, _all_on_two, tmp_path)
    for name, losses in alone.items():
        shares = zip(first[name], second[name], strict=True)
        assert [sum(both) for both in shares] == pytest.approx(losses, rel=1e-4), name
