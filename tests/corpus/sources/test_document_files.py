import gzip
import json
from pathlib import Path

import numpy as np
import pytest

import pipeline_cases as cases
from moesaic.core.errors import DataError
from moesaic.corpus.build_corpus import build_corpus
from moesaic.corpus.cleaning import CleaningConfig
from moesaic.corpus.corpus import Corpus
from moesaic.corpus.corpus_recipes import CorpusRecipe
from moesaic.corpus.corpus_stats import corpus_stats, sample_texts
from moesaic.corpus.languages import UNDETERMINED
from moesaic.corpus.readers.documents import EachLine, EachParagraph
from moesaic.corpus.sources.document_files import (
    DocumentFiles,
    Documents,
    DomainOfField,
    DomainOfFile,
    DomainOfFolder,
    NamedDomain,
)
from moesaic.corpus.split import SplitConfig
from moesaic.corpus.text_rules import DocumentText, GeneralText, normalise_document
from moesaic.data.token_shard_writer import write_shards

ALL_TRAIN = SplitConfig(test=0, valid=0)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(path: str, content: str | bytes) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def build(*files: DocumentFiles, split: SplitConfig = ALL_TRAIN, name: str = "c") -> Corpus:
    recipe = CorpusRecipe(name=name, source=Documents(files=files), split=split)
    return build_corpus(recipe, out=Path(name))


def texts(corpus: Corpus, code: str = UNDETERMINED) -> list[tuple[str, str]]:
    return [(text.text, text.domain) for text in corpus.iter_texts(code)]


def test_a_file_is_one_document_with_its_lines_and_indentation():
    write("a.txt", "def f():\r\n    return\t1  \n\n\nf\\n\n")
    corpus = build(DocumentFiles(path="a.txt"))
    assert texts(corpus) == [("def f():\n    return\t1\n\n\nf\\n", "")]
    assert corpus.text_rules == DocumentText()


@pytest.mark.parametrize(
    ("unit", "expected"),
    [(EachLine(), ["one", "two", "three"]), (EachParagraph(), ["one\ntwo", "three"])],
)
def test_a_file_may_hold_several_documents(unit, expected):
    write("a.txt", "one\ntwo\n\n\nthree\n")
    assert [t for t, _ in texts(build(DocumentFiles(path="a.txt", document=unit)))] == expected


def test_a_domain_is_of_the_folder_the_file_or_a_field():
    write("news/a.txt", "a")
    write("news/b.jsonl.gz", gzip.compress(json.dumps({"body": "b\nc", "about": "x"}).encode()))
    found = build(
        DocumentFiles(path="news/*.txt", domain=DomainOfFolder()),
        DocumentFiles(path="news", text_field="body", domain=DomainOfField(name="about")),
    )
    assert texts(found) == [("a", "news"), ("b\nc", "x")]
    [text] = corpus_stats(found).texts.values()
    counts = text.domains
    assert {domain: splits["train"] for domain, splits in counts.items()} == {"news": 1, "x": 1}
    others = build(DocumentFiles(path="news/a.txt", domain=DomainOfFile()), name="d")
    assert texts(others) == [("a", "a")]


def test_a_language_is_of_the_path_of_a_field_or_undetermined():
    write("de/a.txt", "eins")
    write("b.jsonl", '{"text": "one", "lang": "en"}\n')
    found = build(
        DocumentFiles(path="{lang}/*.txt"), DocumentFiles(path="b.jsonl", language_field="lang")
    )
    assert found.languages == ("deu_Latn", "eng_Latn")
    assert texts(found, "en") == [("one", "")]


def test_documents_are_held_out_whole():
    write("a.txt", "\n".join(f"document number {'x' * i}" for i in range(60)))
    split = SplitConfig(test=0.3, valid=0.2)
    found = build(DocumentFiles(path="a.txt", document=EachLine()), split=split)
    parts = [{t.text for t in found.iter_texts(UNDETERMINED, split=s)} for s in found.splits]
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts)) == 60
    assert len(sample_texts(found, split="test", count=3)) == 3
    alone = build(DocumentFiles(path="a.txt"), name="d")
    assert [s.partition(":")[0] for s in alone.describe_empty_splits()] == [
        "no valid documents",
        "no test documents",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\ntwo \xff\n", "a.txt, line 2: not UTF-8"),
        ("a.txt", b"%PDF-1.7", "a document or an archive, expected plain text"),
        ("a.txt", b"  \n", "empty"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', 'a.jsonl, line 2: no key "text", found bo'),
        ("a.jsonl", b'{"text": 3}\n', '"text" is of type int, expected a text'),
        ("a.jsonl", b'{"text": "x"\n', "a.jsonl, line 1: not valid JSON"),
    ],
)
def test_bad_input_names_file_and_line(name, content, message):
    write(name, content)
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        build(DocumentFiles(path=name))


def test_a_document_beyond_the_limit_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr("moesaic.corpus.readers.limits.MAX_DOCUMENT_BYTES", 10)
    write("a.txt", "one line\nand another\n")
    for unit, message in (
        (None, "EachParagraph"),
        (EachLine(), "line 2"),
        (EachParagraph(), "blank line"),
    ):
        given = {} if unit is None else {"document": unit}
        with pytest.raises(DataError, match=message):
            build(DocumentFiles(path="a.txt", **given))


def test_text_rules_that_a_recipe_names_are_kept():
    source = Documents(files=(DocumentFiles(path="a"),))
    named = CorpusRecipe(name="c", source=source, clean=CleaningConfig(text_rules=GeneralText()))
    assert named.clean.text_rules == GeneralText()
    read = CorpusRecipe.from_yaml(CorpusRecipe(name="c", source=source).to_yaml())
    assert read == CorpusRecipe(name="c", source=source)


@pytest.mark.parametrize("text", ["a\u2028 b \r\n\r\n c\u0301", "\n\n\t x\v\ty \n", "\u200b\n", ""])
def test_normalising_a_document_twice_changes_nothing_more(text):
    once = normalise_document(text)
    assert normalise_document(once) == once


def test_token_shards_have_the_documents_of_each_domain():
    write("a.txt", "aei oua\nou ou")
    write("b/long.txt", "\n".join(cases.sentence("eng_Latn", i) for i in range(9)))
    found = build(
        DocumentFiles(path="a.txt", document=EachLine(), language="en"),
        DocumentFiles(path="b", domain=NamedDomain(name="a/b. c"), language="en"),
    )
    shards = write_shards(found, cases.tokenizer(), out=Path("shards"))
    assert shards.languages == ("eng_Latn",)
    assert shards.domains("eng_Latn") == ("", "a/b. c")
    sizes = [shards.text_rows("eng_Latn", domain=d).size for d in ("", "a/b. c", "x")]
    assert sizes == [2, 1, 0]
    rows = shards.text_rows("eng_Latn", domain="a/b. c")
    [ids] = cases.lists(shards.gather(rows.text_ids(np.arange(1))[0]))
    assert cases.tokenizer().decode(ids) == Path("b/long.txt").read_text()
