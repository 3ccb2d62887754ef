import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_damage import damaged_json

from moesaic.core.errors import DataError, UserError
from moesaic.corpus.build_corpus import build_corpus
from moesaic.corpus.corpus import Corpus
from moesaic.corpus.corpus_recipes import CorpusRecipe
from moesaic.corpus.corpus_stats import corpus_stats, sample_pairs
from moesaic.corpus.sources.local_files import LocalFile, LocalFiles
from moesaic.corpus.text_rules import GeneralText, SoftwareStrings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    (root / "a.tsv").write_text(
        "".join(f"Open the {'x' * n}\tÖffne {'y' * n}\n" for n in range(40))
    )
    (root / "b.txt").write_text("Ein Satz\nNoch ein Satz\n")
    files = (
        LocalFile(path=str(root / "a.tsv"), source="en", target="de"),
        LocalFile(path=str(root / "b.txt"), language="de"),
    )
    build_corpus(CorpusRecipe(name="c", source=LocalFiles(files=files)), out=root / "c")
    return root / "c"


@pytest.fixture(scope="module")
def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "corpus.json").read_text(encoding="utf-8"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    for path in folder.iterdir():
        os.link(path, tmp_path / path.name)
    (tmp_path / "corpus.json").unlink()
    return tmp_path


def use(folder: Path) -> None:
    """Do what commands do with a corpus."""
    corpus = Corpus.open(folder)
    corpus_stats(corpus)
    _ = corpus.text_rules, corpus.fingerprint, corpus.describe_empty_splits()
    for split in corpus.splits:
        list(corpus.pairs(split))
        for code in corpus.languages:
            list(corpus.iter_texts(code, split=split))
    for source, target in corpus.directions:
        if corpus.count(source, target):
            sample_pairs(corpus, source=source, target=target, count=2)


def test_an_intact_corpus_is_used(folder: Path) -> None:
    use(folder)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(data=st.data())
def test_a_damaged_manifest_is_read_or_refused_with_a_sentence(
    data: st.DataObject, folder: Path, written: dict[str, Any], tmp_path_factory: Any
) -> None:
    root = tmp_path_factory.mktemp("damaged")
    for path in folder.iterdir():
        os.link(path, root / path.name)
    (root / "corpus.json").unlink()
    (root / "corpus.json").write_bytes(data.draw(damaged_json(written)))
    with suppress(UserError):
        use(root)


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.tsv", "a/../../secret.tsv", "x\0y"])
def test_a_file_outside_of_the_corpus_is_refused(
    name: str, copy: Path, written: dict[str, Any]
) -> None:
    (copy.parent / "secret.tsv").write_text("secret\n")
    entry = next(iter(written["files"].values()))
    (copy / "corpus.json").write_text(json.dumps(written | {"files": {name: entry}}))
    with pytest.raises(DataError, match=r"corpus\.json.*(inside of|name of a file)"):
        Corpus.open(copy)


def test_a_link_out_of_the_corpus_is_refused(copy: Path, written: dict[str, Any]) -> None:
    (copy / "corpus.json").write_text(json.dumps(written))
    name = next(iter(written["files"]))
    outside = copy.parent / "outside.tsv"
    (copy / name).replace(outside)
    (copy / name).symlink_to(outside)
    with pytest.raises(DataError, match="leads out of"):
        Corpus.open(copy)


@pytest.mark.parametrize(
    ("clean", "rules"),
    [
        ({}, SoftwareStrings()),
        ({"max_characters": 400}, SoftwareStrings()),
        ({"text_rules": {"kind": "GeneralText"}}, GeneralText()),
        ({"text_rules": "SoftwareStrings"}, SoftwareStrings()),
    ],
)
def test_a_corpus_of_an_earlier_version_has_the_rules_of_software_strings(
    clean: dict[str, Any], rules: object, copy: Path, written: dict[str, Any]
) -> None:
    recipe = written["recipe"] | {"clean": clean}
    (copy / "corpus.json").write_text(json.dumps(written | {"recipe": recipe}))
    assert Corpus.open(copy).text_rules == rules
