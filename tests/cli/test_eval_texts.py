"""``moesaic eval`` on a language model: perplexity of held-out documents and of given texts."""

import json

import pytest
import yaml

from moesaic.cli.main import main
from moesaic.corpus.build_corpus import build_corpus
from moesaic.corpus.corpus_recipes import CorpusRecipe
from moesaic.corpus.readers.documents import EachLine
from moesaic.corpus.sources.document_files import DocumentFiles, Documents, DomainOfFolder
from moesaic.corpus.split import SplitConfig
from moesaic.recipes.tiny_recipes import tiny_lm
from serve.language_model_run import LINES, write_language_model_run


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "texts" / name).mkdir(parents=True)
        (tmp_path / "texts" / name / "x.txt").write_text("".join(f"{name} {s}" for s in LINES))
    found = write_language_model_run(tmp_path / "run")
    written = tiny_lm().to_dict() | yaml.safe_load(found.config.read_text()) | {"name": "run"}
    written["data"] = tiny_lm().to_dict()["data"] | {
        "corpus": {"kind": "CorpusFolder", "path": "corpus"}
    }
    found.config.write_text(yaml.safe_dump(written))
    return found


def evaluate(*words: str, capsys) -> str:
    with pytest.raises(SystemExit, match="0"):
        main(["eval", *words, "--resamples", "20"])
    return capsys.readouterr().out


def test_texts_of_the_user_are_scored_by_folder(run, capsys):
    words = (str(run.path), "--texts", "texts", "--from", "en")
    found = json.loads(evaluate(*words, "--json", capsys=capsys))
    groups = {group["name"]: group for group in found["groups"]}
    assert set(groups) == {"all documents", "a", "b"}
    assert groups["all documents"]["num_bytes"] == 2 * groups["a"]["num_bytes"]
    shown = evaluate(*words, capsys=capsys)
    assert "bits per byte" in shown
    assert not run.perplexity.exists()


def test_the_held_out_documents_of_the_corpus_are_scored_and_reported(run, capsys):
    files = DocumentFiles(path="texts", document=EachLine(), domain=DomainOfFolder(), language="en")
    split = SplitConfig(test=0.9, valid=0)
    build_corpus(
        CorpusRecipe(name="c", source=Documents(files=(files,)), split=split),
        out=run.path.parent / "corpus",
    )
    evaluate(str(run.path), "--corpus", "corpus", capsys=capsys)
    written = json.loads(run.perplexity.read_text())
    assert written["groups"][0]["documents"] >= 4
    assert "Perplexity and bits per byte" in run.report.read_text()


def test_options_of_translation_do_not_fit(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["eval", str(run.path), "--to", "de"])
    assert "is a language model, which is scored on texts: --to does" in capsys.readouterr().err
