"""Data preparation: corpus languages, one tokenizer per run, token shards created once."""

from pathlib import Path

import pytest

from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.errors import ConfigError, DataError
from moesaic.corpus.cleaning import CleaningConfig
from moesaic.corpus.split import SplitConfig
from moesaic.corpus.text_rules import GeneralText, SoftwareStrings, TextRules, read_text_rules
from moesaic.data.token_shards import TokenShards
from moesaic.data.train_tokenizer import TrainedTokenizer
from moesaic.distributed.world import SingleProcess
from moesaic.testing.tiny_models import SMALL_SYNTHETIC_CORPUS, synthetic_run, text_of
from moesaic.train.corpus_source import BuiltCorpus, CorpusFolder, NamedCorpus
from moesaic.train.prepare_data import CorpusSubset, EncodedCorpus
from moesaic.train.run import Run
from moesaic.train.training_data import Preparation

pytestmark = pytest.mark.usefixtures("data_home")


def _prepare(run: Run, folder: Path, notes: list[str] | None = None) -> EncodedCorpus:
    notify = [].append if notes is None else notes.append
    place = Preparation(RunDir(folder), SingleProcess(), notify, run.initial_weights.way_out)
    return text_of(run).prepare(place).encoded


def test_a_run_sees_only_its_languages(tmp_path: Path) -> None:
    run = synthetic_run(languages=("English", "qac_Grek"))
    prepared = _prepare(run, tmp_path)
    assert prepared.tokenizer.languages == ("eng_Latn", "qac_Grek")
    assert prepared.shards.directions == (("eng_Latn", "qac_Grek"),)


def test_tokenizer_and_shards_are_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = synthetic_run()
    first = _prepare(run, tmp_path)
    written = (tmp_path / "tokenizer.json").stat().st_mtime_ns
    monkeypatch.setattr(TokenShards, "verify", None)
    second = _prepare(run, tmp_path)
    assert (tmp_path / "tokenizer.json").stat().st_mtime_ns == written
    assert second.shards.path == first.shards.path


@pytest.mark.parametrize("rules", [GeneralText(), SoftwareStrings()])
def test_a_run_records_the_text_rules_of_its_corpus(rules: TextRules, tmp_path: Path) -> None:
    recipe = SMALL_SYNTHETIC_CORPUS.replace(
        name=f"rules-{type(rules).__name__}", clean=CleaningConfig(text_rules=rules)
    )
    _prepare(synthetic_run(corpus=BuiltCorpus(recipe=recipe)), tmp_path)
    assert read_text_rules(RunDir(tmp_path).text_rules) == rules


def test_an_empty_split_is_reported_before_training(tmp_path: Path) -> None:
    recipe = SMALL_SYNTHETIC_CORPUS.replace(name="no-valid", split=SplitConfig(valid=0, test=0.1))
    run, notes = synthetic_run(corpus=BuiltCorpus(recipe=recipe)), list[str]()
    _prepare(run, tmp_path, notes)
    [note] = [note for note in notes if "nothing to" in note]
    assert "no valid pairs of eng_Latn-qaa_Latn, eng_Latn-qab_Cyrl, eng_Latn-qac_Grek" in note


def test_a_language_that_the_corpus_lacks_is_named() -> None:
    corpus = text_of(synthetic_run()).corpus.open()
    with pytest.raises(ConfigError, match=r"few-phrases has no deu_Latn; it has eng_Latn, qaa"):
        CorpusSubset.of(corpus, languages=["German", "English"])


def test_subsets_of_different_languages_have_different_fingerprints() -> None:
    corpus = text_of(synthetic_run()).corpus.open()
    whole, part = (CorpusSubset.of(corpus, languages=c) for c in ((), ("eng_Latn", "qab_Cyrl")))
    assert whole.languages == corpus.languages
    assert whole.fingerprint != part.fingerprint
    assert part.directions == (("eng_Latn", "qab_Cyrl"),)


def test_a_tokenizer_of_another_run_is_refused(tmp_path: Path) -> None:
    _prepare(synthetic_run(languages=("English", "qac_Grek")), tmp_path)
    larger = synthetic_run(tokenizer=TrainedTokenizer(vocab_size=420))
    with pytest.raises(ConfigError) as caught:
        _prepare(larger, tmp_path)
    size, tags = caught.value.problems
    assert "has 400 ids, the run config has 420" in size
    assert "no tag for qaa_Latn, qab_Cyrl" in tags


def test_a_missing_corpus_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no corpus here"):
        _prepare(synthetic_run(corpus=CorpusFolder(path=str(tmp_path / "none"))), tmp_path)
    with pytest.raises(DataError, match="catalogues-small"):
        _prepare(synthetic_run(corpus=NamedCorpus(name="catalogs-small")), tmp_path)
