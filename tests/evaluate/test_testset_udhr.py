import tarfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import pytest

from moesaic.core.errors import UserError
from moesaic.corpus.corpus_recipes import NAMED_CORPORA
from moesaic.corpus.readers.udhr_page import parse_udhr
from moesaic.evaluate.testset import udhr_testsets

# code: language tag, preamble, article 1, article 2 (a list)
PAGES = {
    "eng": ("en", ["Whereas", "Now"], ["All are <b>born</b> free."], ["One", "Two"]),
    "deu_1901": ("de-1901", ["Da", "Nun"], ["Alle sind frei geboren, daß."], ["Eins", "Zwei"]),
    "deu_1996": ("de-1996", ["Da"], ["Alle sind frei geboren, dass."], ["Eins", "Zwei"]),
    "068": ("fr", ["Un"], ["Un autre."], ["x"]),
    "fra": ("fr", ["Considérant", "Or"], ["Tous naissent libres."], ["Un"]),
    "xyz": ("und", ["?"], ["?"], ["?"]),
}


def page(code: str) -> str:
    tag, preamble, first, second = PAGES[code]
    start = "\n".join(f"<p>{text}</p>" for text in preamble)
    items = "\n".join(f"<li>\n <p>{text}</p>\n</li>" for text in second)
    return (
        f'<!doctype html><html data-code="{code}" data-iso6393="{code[:3]}" lang="{tag}">'
        f"<head><title>x</title></head><body><h1>Title</h1><header><h2>P</h2>{start}</header>"
        f'<article data-number="1"><h2>A 1</h2><p>{first[0]}</p></article>'
        f'<article data-number="2"><h2>A 2</h2><ol>{items}</ol></article></body></html>'
    )


def write_package(home: Path, pages: Mapping[str, str]) -> None:
    folder = home / "packages/npm"
    folder.mkdir(parents=True)
    with tarfile.open(folder / "udhr-6.0.0.tgz", "w:gz") as tar:
        for code, text in pages.items():
            info = tarfile.TarInfo(f"package/declaration/{code}.html")
            info.size = len(text.encode())
            tar.addfile(info, BytesIO(text.encode()))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOESAIC_HOME", str(tmp_path))
    write_package(tmp_path, {code: page(code) for code in PAGES})
    return tmp_path


def test_a_page_is_read_by_article() -> None:
    found = parse_udhr(page("eng"), name="eng.html")
    assert found.articles == {
        0: ("Whereas", "Now"),
        1: ("All are born free.",),
        2: ("One", "Two"),
    }
    with pytest.raises(UserError, match=r"odd\.html: no declaration"):
        parse_udhr("<html><p>Hello</p></html>", name="odd.html")


@pytest.mark.usefixtures("home")
def test_paragraphs_are_aligned_where_an_article_has_as_many() -> None:
    [german, french], _ = udhr_testsets([("en", "de"), ("eng_Latn", "fr")])
    # the newest orthography; its preamble is shorter than the English one and left out
    assert german.references == ("Alle sind frei geboren, dass.", "Eins", "Zwei")
    assert german.sources == ("All are born free.", "One", "Two")
    assert french.references == ("Considérant", "Or", "Tous naissent libres.")
    assert (german.name, german.target, german.total_count) == ("udhr 6.0.0", "deu_Latn", 3)
    [back], _ = udhr_testsets([("fr", "de")], limit=1)
    assert (back.sources, back.references) == (
        ("Tous naissent libres.",),
        ("Alle sind frei geboren, dass.",),
    )


@pytest.mark.usefixtures("home")
def test_a_language_without_a_declaration_is_reported_and_left_out() -> None:
    tests, notes = udhr_testsets([("en", "it"), ("en", "de")])
    assert [test.target for test in tests] == ["deu_Latn"]
    assert notes == ("udhr has no declaration in ita_Latn",)
    with pytest.raises(UserError, match=r"directions asked for: udhr has no .* in ita_Latn"):
        udhr_testsets([("en", "it")])


def test_no_corpus_with_a_name_reads_it() -> None:
    assert all("udhr" not in recipe.to_yaml().casefold() for recipe in NAMED_CORPORA.values())
