"""A run can start from the weights and the tokenizer of another run."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from moesaic.checkpoint import manifest
from moesaic.checkpoint.full_checkpoint import load_checkpoint
from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.safetensors_io import read_header, read_tensors, write_tensors
from moesaic.checkpoint.trained_directions import read_trained_directions
from moesaic.core.errors import CheckpointError, ConfigError
from moesaic.corpus.corpus_recipes import CorpusRecipe
from moesaic.corpus.sources.synthetic import SyntheticLanguages
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.distributed.world import SingleProcess
from moesaic.model.transformer import Transformer
from moesaic.moe.auxiliary_losses import RouterZLoss, SwitchBalance
from moesaic.moe.config import MoE
from moesaic.moe.expert_bias import BiasUpdate
from moesaic.moe.expert_selection import Hash
from moesaic.moe.expert_selection_dynamic import DenseAll
from moesaic.moe.router_noise import StochasticWarmup
from moesaic.moe.shared_experts import SharedExperts
from moesaic.optim.lr_schedule import WSD
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallelize import parallelize
from moesaic.parallel.precision import BFloat16
from moesaic.parallel.trainable_parameters import AllParameters
from moesaic.recipes.lookup import warm_start
from moesaic.serve.translator import Translator
from moesaic.testing.tiny_models import (
    change_text,
    synthetic_run,
    text_of,
    tiny_model_config,
    tiny_run,
)
from moesaic.train.corpus_source import BuiltCorpus
from moesaic.train.resume import ResumeFrom, ResumeLatest
from moesaic.train.run import Run
from moesaic.train.run_training import train
from moesaic.train.training_hooks import Hook, no_progress
from moesaic.train.warm_start import RandomWeights, WeightsOfRun


class Weights(Hook):
    """Keeps the weights before the first step, whole on every rank."""

    def before_run(self, trainer) -> None:
        self.optimizer_is_fresh = not trainer.optimizer.state
        self.weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


@pytest.fixture(scope="module")
def init(data_home, tmp_path_factory):
    """A finished run of a few steps."""
    out = tmp_path_factory.mktemp("runs") / "init"
    train(synthetic_run(steps=5, schedule=WSD()), out, progress=no_progress)
    return out


def other_corpus(**changes):
    recipe = CorpusRecipe(name="more-phrases", source=SyntheticLanguages(phrases=300, **changes))
    return BuiltCorpus(recipe=recipe)


def started(init, **changes) -> Run:
    return change_text(warm_start(str(init), changes=["steps=3"]), **changes)


def test_weights_and_tokenizer_are_those_of_the_run_and_the_optimizer_is_new(init, tmp_path):
    out, seen = tmp_path / "next", Weights()
    run = started(init, corpus=other_corpus())
    result = train(run, out, hooks=[seen], progress=no_progress)
    weights = read_tensors(RunDir(init).model)
    assert result.steps == 3
    assert seen.optimizer_is_fresh
    assert all(torch.equal(seen.weights[name], weights[name]) for name in seen.weights)
    assert RunDir(out).tokenizer.read_bytes() == RunDir(init).tokenizer.read_bytes()
    recorded = Run.from_yaml(RunDir(out).config.read_text())
    assert recorded == run
    assert recorded.initial_weights == WeightsOfRun(path=str(init))
    assert not torch.equal(
        read_tensors(RunDir(out).model)["embedding.weight"], weights["embedding.weight"]
    )


def test_a_warm_started_run_resumes_without_the_run_that_it_came_from(init, tmp_path):
    copy, whole, parts = (tmp_path / name for name in ("init", "whole", "parts"))
    copy.mkdir()
    for name in ("config.yaml", "tokenizer.json", "model.safetensors"):
        (copy / name).write_bytes((init / name).read_bytes())
    run = started(copy)
    train(run, whole, progress=no_progress)
    train(run, parts, until=2, progress=no_progress)
    (copy / "model.safetensors").unlink()
    train(run, parts, resume=ResumeLatest(), progress=no_progress)
    assert RunDir(parts).model.read_bytes() == RunDir(whole).model.read_bytes()


@pytest.mark.parametrize("added", [(), ("deu_Latn",)])
def test_what_an_import_carried_goes_along_but_for_a_tokenizer_that_grew(init, tmp_path, added):
    source, out = RunDir(tmp_path / "imported-model"), RunDir(tmp_path / "next")
    shutil.copytree(init, source.path)
    files = {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"}
    for folder in (source.imported, out.path):
        folder.mkdir()
    for name in files:
        (source.imported / name).write_text("{}")
    model = Run.from_yaml(source.config.read_text()).model
    start = WeightsOfRun(path=str(source.path), added_languages=added)
    start.prepare(out, model=model, trainable=AllParameters())
    kept = {"config.json", "generation_config.json"} if added else files
    assert {path.name for path in out.imported.iterdir()} == kept


def test_sharded_ranks_start_from_the_same_weights(init, tmp_path):
    run = started(init, steps=1)
    train(run, tmp_path / "one", progress=no_progress)
    sharded = run.replace(parallel=ParallelConfig(plan=ParallelPlan(tensor=2, expert=2)))
    run_on_ranks(2, lambda: train(sharded, tmp_path / "two", progress=no_progress))
    one, two = (read_tensors(RunDir(tmp_path / name).model) for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)


def test_ranks_export_the_weights_of_their_checkpoint_also_into_another_directory(init, tmp_path):
    plan, precision = ParallelConfig(plan=ParallelPlan(pipe=2, expert=2, zero=2)), BFloat16()
    run = started(init, steps=1, parallel=plan, precision=precision, gradient_accumulation_steps=2)
    run_on_ranks(4, lambda: train(run, tmp_path / "one", progress=no_progress))
    resume, other = ResumeFrom(path=str(tmp_path / "one")), tmp_path / "two"
    run_on_ranks(4, lambda: train(run, other, resume=resume, progress=no_progress))
    path = RunDir(tmp_path / "one").model
    stored = load_checkpoint(tmp_path / "one" / "checkpoints").files["model"]
    rounded = {n: t.bfloat16() for n, t in stored.items()}
    write_tensors(tmp_path / "whole", tensors=rounded, metadata=read_header(path).metadata)
    assert (
        path.read_bytes() == (tmp_path / "whole").read_bytes() == RunDir(other).model.read_bytes()
    )


def test_resuming_hashes_each_file_of_a_checkpoint_once_on_one_rank(init, tmp_path, monkeypatch):
    sharded = ParallelConfig(plan=ParallelPlan(tensor=2, expert=2))
    run, hashed, sha256 = synthetic_run(steps=6, parallel=sharded), [], manifest.sha256
    run_on_ranks(2, lambda: train(run, tmp_path, until=5, progress=no_progress))
    saved = tmp_path / "checkpoints" / "step-00000005"

    def counted(path):
        hashed.extend([path.name] if path.parent == saved else [])
        return sha256(path)

    monkeypatch.setattr(manifest, "sha256", counted)

    def resumed():
        train(run, tmp_path, resume=ResumeLatest(), progress=no_progress)
        return hashed

    one, two = run_on_ranks(2, resumed)
    assert sorted(one + two) == sorted(manifest.read_manifest(saved).files)
    assert one
    assert two


def test_a_model_that_does_not_fit_is_refused_before_any_work_and_tensors_are_named(init, tmp_path):
    run = started(init, model=tiny_model_config(layers=2).replace(vocab_size=400))
    with pytest.raises(CheckpointError, match=r"--init .*encoder\.1\..* is missing") as caught:
        train(run, tmp_path / "next", progress=no_progress)
    assert "leave out the recipe" in str(caught.value)
    assert not (tmp_path / "next" / "config.yaml").exists()


def test_weights_under_the_names_of_an_earlier_version_are_taken(init, tmp_path):
    model = tiny_model_config(moe=MoE(experts=2, shared_experts=SharedExperts()))
    old, new = Transformer(model), Transformer(model)
    parallel_model = parallelize(new, parallel=ParallelConfig(), world=SingleProcess())
    for name in ("config.yaml", "tokenizer.json"):
        (tmp_path / name).write_bytes((init / name).read_bytes())
    weights = {name.replace("shared_experts", "beside"): p for name, p in old.named_parameters()}
    assert weights.keys() != dict(old.named_parameters()).keys()
    save_file(weights, RunDir(tmp_path).model)
    WeightsOfRun(path=str(tmp_path)).fill(parallel_model, seed=0)
    assert all(map(torch.equal, new.parameters(), old.parameters()))


def test_a_language_without_a_tag_is_refused_with_a_way_out(init, tmp_path):
    run = started(init, corpus=other_corpus(languages=("qaa_Latn", "qad_Latn")))
    with pytest.raises(ConfigError, match=r"no tag for qad_\w+, but for .*--set data.languages="):
        train(run, tmp_path / "next", progress=no_progress)


def test_a_run_without_weights_is_refused(init, tmp_path):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_bytes((init / "config.yaml").read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.safetensors missing"):
        train(started(tmp_path / "begun"), tmp_path / "next", progress=no_progress)
    with pytest.raises(CheckpointError, match="no such run"):
        warm_start(str(tmp_path / "none"))


def test_the_config_is_that_of_the_run_unless_a_recipe_is_named(init):
    run = warm_start(str(init), changes=["steps=7"])
    assert (run.name, run.steps) == ("synthetic-warm-start", 7)
    assert warm_start(str(init), which="tiny").model.dim == 64
    assert synthetic_run().initial_weights == RandomWeights()
    languages = ["data.languages=[en,qaa]"]
    chosen = warm_start(str(init), changes=languages)
    corpus = "data.corpus=CorpusFolder(path=x)"
    assert text_of(warm_start(str(init), changes=[corpus])).languages == ()
    both = warm_start(str(init), changes=[*languages, corpus])
    assert text_of(both).languages == text_of(chosen).languages == ("en", "qaa")
    with pytest.raises(ConfigError):
        warm_start(str(init), changes=["stepz=3"])


def test_the_directions_of_the_first_run_are_recorded_with_share_0_also_when_resumed(
    init, tmp_path
):
    out, moved = tmp_path / "next", tmp_path / "moved"
    run = started(init, corpus=other_corpus(), languages=("eng_Latn", "qaa_Latn"))
    train(run, out, until=1, progress=no_progress)
    first = read_trained_directions(RunDir(init).directions)
    record = read_trained_directions(RunDir(out).directions)
    assert set(record.directions) == set(first.directions)
    assert record.own_directions == (("eng_Latn", "qaa_Latn"),)
    assert all(s.rows and not s.valid_rows for s in record.streams if not s.share)
    train(run, moved, resume=ResumeFrom(path=str(out)), progress=no_progress)
    train(run, out, resume=ResumeLatest(), progress=no_progress)
    assert read_trained_directions(RunDir(out).directions) == record
    assert read_trained_directions(RunDir(moved).directions) == record
    translator = Translator.open(out)
    assert all(translator.is_trained(*direction) for direction in first.directions)


def test_routed_layers_that_nothing_balances_get_a_balance_term(tmp_path):
    def started_model(**changes):
        model = tiny_model_config(moe=MoE(experts=4, **changes))
        model = model.replace(encoder=model.encoder.replace(moe=model.moe))
        (tmp_path / "config.yaml").write_text(tiny_run(model=model).to_yaml())
        return warm_start(str(tmp_path)).model

    z, bias, added = RouterZLoss(), BiasUpdate(), SwitchBalance()
    for terms, wanted in (((z,), (z, added)), ((z, bias), (z, bias)), ((), (added,))):
        model = started_model(balance=terms)
        assert model.moe.balance == model.encoder.moe.balance == wanted
    for select in (Hash(), DenseAll()):
        assert started_model(select=select, balance=()).moe.balance == ()
    assert started_model(noise=StochasticWarmup(), balance=()).moe.balance == (added,)
    started_model(balance=())
    chosen = warm_start(str(tmp_path), changes=["model.moe.balance=[]"])
    assert chosen.model.moe.balance == ()
