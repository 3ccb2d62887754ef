"""``train``: files of a run directory, resuming, and stop reasons."""

import os
import re
import shutil
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from compare_runs import compare_run_dirs

from moesaic.checkpoint.full_checkpoint import read_state
from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.run_record import read_run_record
from moesaic.checkpoint.safetensors_io import read_tensors
from moesaic.core.errors import CheckpointError, ConfigError, DataError, UserError
from moesaic.core.files import sha256
from moesaic.data.collators import DecoderOnlyCollator
from moesaic.data.mixture import MixtureConfig, WeightedTask
from moesaic.data.tasks import CausalLM, Translation
from moesaic.data.train_tokenizer import TrainedTokenizer
from moesaic.model.config import Stack
from moesaic.model.head import LanguageModelHead
from moesaic.moe.config import NoMoE
from moesaic.monitor.metric_writers import read_metrics
from moesaic.monitor.progress_display import ProgressDisplay, RunStatus
from moesaic.optim.lr_schedule import WSD, LRSchedule
from moesaic.optim.optimizer import AdamW
from moesaic.parallel.precision import BFloat16
from moesaic.testing.tiny_models import change_text, synthetic_run, text_of, tiny_model_config
from moesaic.train.corpus_source import CorpusFolder
from moesaic.train.resume import ResumeFrom, ResumeLatest, learning_rate_jump
from moesaic.train.run import LogConfig, Run, TensorBoard, ValidationConfig
from moesaic.train.run_training import train
from moesaic.train.trainer import StepReport, Trainer
from moesaic.train.training_hooks import Hook, no_progress
from moesaic.train.warm_start import WeightsOfRun

pytestmark = pytest.mark.usefixtures("data_home")


PROMISED = [
    "train/loss",
    "train/loss/translation",
    "train/loss/denoising",
    "train/loss/qab_Cyrl",
    "train/loss_balance",
    "train/loss_z",
    "train/objective",
    "train/grad_norm",
    "train/lr",
    "train/tokens",
    "train/skipped",
    "perf/tokens_per_s",
    "perf/step_ms",
    "time/data_ms",
    "moe/max_vio",
    "moe/load_entropy",
    "moe/dead_experts",
    "moe/drop_frac",
    "valid/loss",
    "valid/loss/denoising",
]


class Notes(ProgressDisplay):
    """A progress display that records its notes."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def __call__(self, _: RunStatus) -> "Notes":
        return self

    def note(self, text: str) -> None:
        self.messages.append(text)


class At(Hook):
    """Does something after one step."""

    def __init__(self, step: int, action) -> None:
        self.step, self.action = step, action

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        if report.step == self.step:
            self.action(trainer)


@pytest.fixture(scope="module")
def whole(data_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 20 steps."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(synthetic_run(), out, progress=no_progress)
    return out


def test_a_run_directory_is_a_model_directory(whole: Path) -> None:
    folder = RunDir(whole)
    folder.require_text_model()
    assert Run.from_yaml(folder.config.read_text()) == synthetic_run()
    card = folder.card.read_text()
    assert yaml.safe_load(card.split("---")[1])["language"] == ["en", "qaa", "qab", "qac"]
    weights = read_tensors(folder.model)
    assert weights["embedding.weight"].shape == (400, 16)
    assert (folder.checkpoints / "latest").read_text().strip() == "step-00000020"


def test_the_metrics_have_the_documented_names(whole: Path) -> None:
    rows = list(read_metrics(RunDir(whole).metrics))
    assert [row["step"] for row in rows] == [4, 8, 10, 12, 16, 20]
    last = rows[-1]
    for name in PROMISED:
        assert name in last, name
    parts = last["train/cross_entropy"] + last["train/loss_balance"] + last["train/loss_z"]
    assert last["train/objective"] == pytest.approx(parts, rel=1e-6)
    assert last["train/loss"] < rows[0]["train/loss"]


def test_a_run_stopped_at_until_resumes_to_the_same_weights(whole: Path, tmp_path: Path) -> None:
    first = train(synthetic_run(), tmp_path / "run", until=7, progress=no_progress)
    assert (first.stop_reason, first.steps, first.exit_code) == ("until", 7, 0)
    second = train(synthetic_run(), tmp_path / "run", resume=ResumeLatest(), progress=no_progress)
    assert (second.stop_reason, second.steps) == ("finished", 20)
    assert compare_run_dirs(whole, tmp_path / "run") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_prints_how_to_resume(
    number: signal.Signals, whole: Path, tmp_path: Path
) -> None:
    board, out = Notes(), tmp_path / "run"
    stop = At(6, lambda _: os.kill(os.getpid(), number))
    result = train(synthetic_run(), out, hooks=[stop], progress=board)
    assert (result.stop_reason, result.exit_code) == (number.name, 128 + number)
    assert result.steps == 6
    assert board.messages[-1] == (
        f"{number.name}: saved after step 6. Continue with: moesaic train --resume {out}"
    )
    train(synthetic_run(), out, resume=ResumeLatest(), progress=no_progress)
    assert compare_run_dirs(whole, out) == []


def test_a_used_directory_is_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not empty .*--resume auto.*another --out"):
        train(synthetic_run(), whole, progress=no_progress)
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(CheckpointError, match=r"holiday\.jpg"):
        train(synthetic_run(), tmp_path, progress=no_progress)


@pytest.mark.parametrize("what", ["corpus", "languages", "tokenizer", "initial", "weights", "disk"])
def test_a_start_that_fails_leaves_nothing(
    what: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {
        "corpus": {"corpus": CorpusFolder(path=str(tmp_path / "none"))},
        "languages": {"languages": ("eng_Latn", "fra_Latn")},
        "tokenizer": {"tokenizer": TrainedTokenizer(vocab_size=9000)},
        "initial": {"initial_weights": WeightsOfRun(path=str(tmp_path / "none"))},
        "weights": {
            "initial_weights": WeightsOfRun(path=str(whole)),
            "languages": ("eng_Latn", "qaa_Latn"),
        },
        "disk": {},
    }
    out = tmp_path / "runs" / "new"
    if what in ("weights", "disk"):  # everything is prepared when it fails

        def fail(*_: object, **__: object) -> None:
            raise DataError("no space left")

        monkeypatch.setattr("moesaic.train.run_training._open_writers", fail)
    with pytest.raises(UserError):
        train(synthetic_run(**wrong[what]), out, progress=no_progress)
    assert not (tmp_path / "runs").exists()


def test_after_a_start_that_failed_the_files_of_the_user_are_there_and_nothing_else(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.yaml").write_text("steps: 3\n")
    wrong = synthetic_run(corpus=CorpusFolder(path=str(tmp_path / "none")))
    with pytest.raises(DataError):
        train(wrong, tmp_path, progress=no_progress)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert (tmp_path / "config.yaml").read_text() == "steps: 3\n"
    assert train(synthetic_run(), tmp_path, until=1, progress=no_progress).steps == 1


def test_a_resume_that_fails_leaves_the_run_as_it_was(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    before = {p.name: p.stat().st_size for p in (tmp_path / "run").rglob("*")}
    run = synthetic_run(steps=20, corpus=CorpusFolder(path=str(tmp_path / "none")))
    with pytest.raises(UserError):
        train(run, tmp_path / "run", resume=ResumeLatest(), progress=no_progress)
    assert {p.name: p.stat().st_size for p in (tmp_path / "run").rglob("*")} == before


def test_another_config_is_refused_and_its_keys_are_named(whole: Path) -> None:
    head = LanguageModelHead(label_smoothing=0.2)
    model = synthetic_run().model.replace(head=head)
    other = synthetic_run(model=model, gradient_accumulation_steps=2)
    with pytest.raises(
        CheckpointError, match=r"head\.label_smoothing: 0\.1 .*gradient_accumulation_steps: 1 .*2"
    ):
        train(other, whole, resume=ResumeLatest(), progress=no_progress)
    assert Run.from_yaml(RunDir(whole).config.read_text()) == synthetic_run()


def test_a_finished_run_can_be_extended_with_a_lower_learning_rate(tmp_path: Path) -> None:
    board = Notes()
    train(synthetic_run(steps=6), tmp_path, progress=no_progress)
    longer = synthetic_run(steps=8, optimizer=AdamW(lr=1e-4))
    result = train(longer, tmp_path, resume=ResumeLatest(), progress=board)
    assert result.steps == 8
    assert "optimizer.lr: was 0.001, now 0.0001" in board.messages


def test_a_key_that_is_new_since_the_checkpoint_has_its_default(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_saved_before(path: Path) -> dict:
        state = read_state(path)
        del state["config"]["optimizer"]["router_lr"]
        return state

    monkeypatch.setattr("moesaic.train.run_training.read_verified_state", as_saved_before)
    resume = ResumeFrom(path=str(whole))
    assert (
        train(synthetic_run(), tmp_path / "next", resume=resume, progress=no_progress).steps == 20
    )


def test_extending_a_finished_run_says_how_the_learning_rate_jumps(tmp_path: Path) -> None:
    board, schedule = Notes(), WSD(warmup=1, decay=0.5)
    train(synthetic_run(steps=4, schedule=schedule), tmp_path, progress=no_progress)
    longer = synthetic_run(steps=12, schedule=schedule)
    train(longer, tmp_path, resume=ResumeLatest(), until=5, progress=board)
    (note,) = [text for text in board.messages if "learning rate" in text]
    assert "0.293 of its full value at step 4 (of 4), 1 at step 5 (of 12)" in note


def test_a_name_that_is_refused_by_now_does_not_hide_the_jump() -> None:
    run = synthetic_run(steps=4, schedule=WSD(warmup=1, decay=0.5))
    saved = run.to_dict() | {"name": "a/b"}
    (note,) = learning_rate_jump(saved, run=run.replace(steps=12), step=4)
    assert "0.293 of its full value at step 4" in note


def test_a_plugin_that_is_edited_during_training_is_recorded_as_it_was_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Edit(Hook):
        def after_step(self, trainer: Trainer, report: StepReport) -> None:  # noqa: ARG002
            file.write_text("# edited\n")

    file, module = tmp_path / "my_schedule.py", ModuleType("user_schedule")
    file.write_text("# loaded\n")
    loaded, module.__file__ = sha256(file), str(file)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    words = {"__module__": module.__name__, "__doc__": "A schedule."}
    flat = type("Flat", (LRSchedule,), words | {"lr_factor": lambda *_, **__: 1.0})
    try:
        train(
            synthetic_run(steps=1, schedule=flat()),
            tmp_path / "run",
            hooks=[Edit()],
            progress=no_progress,
        )
    finally:
        del LRSchedule.members["Flat"]
    record = read_run_record(RunDir(tmp_path / "run"))
    assert record is not None
    assert [(p.name, p.sha256) for p in record.plugins] == [(file.name, loaded)]
    assert (RunDir(tmp_path / "run").plugins / file.name).read_text() == "# loaded\n"


def test_a_damaged_checkpoint_is_skipped_with_a_note(whole: Path, tmp_path: Path) -> None:
    board, out = Notes(), tmp_path / "run"
    train(synthetic_run(), out, until=12, progress=no_progress)
    newest = RunDir(out).checkpoints / "step-00000012" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7])
    train(synthetic_run(), out, resume=ResumeLatest(), progress=board)
    assert any("skipped" in n and "model.safetensors is truncated" in n for n in board.messages)
    assert any("resuming after step 10" in n for n in board.messages)
    assert compare_run_dirs(whole, out) == []


def test_a_run_resumes_in_another_directory(whole: Path, tmp_path: Path) -> None:
    train(synthetic_run(), tmp_path / "one", until=10, progress=no_progress)
    resume = ResumeFrom(path=str(tmp_path / "one"))
    train(synthetic_run(), tmp_path / "two", resume=resume, progress=no_progress)
    assert RunDir(tmp_path / "two").model.read_bytes() == RunDir(whole).model.read_bytes()
    with pytest.raises(CheckpointError, match="no valid checkpoint to resume from"):
        train(
            synthetic_run(),
            tmp_path / "3",
            resume=ResumeFrom(path=str(tmp_path)),
            progress=no_progress,
        )


def test_a_diverging_run_stops_with_its_last_good_state(tmp_path: Path) -> None:
    def break_it(trainer: Trainer) -> None:
        trainer.optimizer.param_groups[0]["base_lr"] = 1.0
        trainer.model.decoder_norm.weight.register_hook(lambda grad: grad * float("nan"))

    with pytest.raises(UserError, match=r"5 steps in a row .*step 7.*decoder_norm.*--resume"):
        train(synthetic_run(), tmp_path, hooks=[At(7, break_it)], progress=no_progress)
    saved = RunDir(tmp_path).checkpoints / "step-00000007" / "model.safetensors"
    assert all(bool(t.isfinite().all()) for t in read_tensors(saved).values())


def test_config_problems_are_raised_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vocab_size=400"):
        train(synthetic_run(model=tiny_model_config()), tmp_path / "run", progress=no_progress)
    assert not (tmp_path / "run").exists()


VARIANTS = {
    "dense": {"model": tiny_model_config(moe=NoMoE()).replace(vocab_size=400)},
    "bfloat16": {"precision": BFloat16()},
    "decoder-only": {
        "model": tiny_model_config().replace(vocab_size=400, encoder=Stack(layers=0)),
        "loader": text_of(synthetic_run()).loader.replace(collator=DecoderOnlyCollator()),
        "mixture": MixtureConfig(
            tasks=(WeightedTask(task=CausalLM()), WeightedTask(task=Translation()))
        ),
    },
    "no-validation": {"validation": ValidationConfig(every=0)},
    "tensorboard": {"log": LogConfig(every=1, sinks=(TensorBoard(),))},
    "two-languages": {"languages": ("English", "qab_Cyrl")},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_run_trains_and_resumes(variant: str, tmp_path: Path) -> None:
    run = synthetic_run(steps=4, schedule=WSD(warmup=1), **VARIANTS[variant])
    train(run, tmp_path, until=2, progress=no_progress)
    result = train(run, tmp_path, resume=ResumeLatest(), progress=no_progress)
    assert result.stop_reason == "finished"
    assert result.metrics["train/loss"] < 7
    assert bool(torch.isfinite(torch.tensor(list(result.metrics.values()))).all())


def test_rows_that_are_too_long_are_left_out_with_a_note(tmp_path: Path) -> None:
    notes = Notes()

    run = synthetic_run(steps=8)
    run = change_text(run, loader=text_of(run).loader.replace(max_source=14, max_target=14))
    train(run, tmp_path / "run", progress=notes)
    (messages,) = [n for n in notes.messages if "left out" in n]
    assert "loader.max_source=14" in messages
    left_out, drawn = re.findall(r"([\d,]+) of ([\d,]+) rows drawn", messages)[0]
    assert 0 < int(left_out.replace(",", "")) < int(drawn.replace(",", ""))
    assert "eng_Latn-" in messages
