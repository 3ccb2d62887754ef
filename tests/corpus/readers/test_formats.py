import gzip
import json
from pathlib import Path

import polib
import pytest
from catalogue_files import compress, mo_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.core.errors import UserError
from moesaic.corpus.readers.compressed import COMPRESSED
from moesaic.corpus.readers.formats import read_pairs, read_texts
from moesaic.corpus.readers.gettext import parse_mo, parse_po
from moesaic.corpus.readers.moses import read_aligned
from moesaic.corpus.readers.text_lines import read_lines
from moesaic.corpus.readers.tsv import escape_field, unescape_field

SUFFIXES = ["", *COMPRESSED]
PO = r"""
msgid ""
msgstr ""
"Content-Type: text/plain; charset=UTF-8\n"

#: a.py:1
msgctxt "menu"
msgid "Open \"%s\""
msgstr ""
"„%s“ "
"öffnen"
# plural
msgid "%d file"
msgid_plural "%d files"
msgstr[0] "%d Datei"
msgstr[1] "%d Dateien"

#, fuzzy
msgid "Close"
msgstr "Falsch"

msgid "Untranslated"
msgstr ""

#. Default: "Save all"
msgid "save_all"
msgstr "Alles speichern"

#~ msgid "Old"
#~ msgstr "Alt"
"""
TMX = """<?xml version="1.0"?><tmx version="1.4"><header/><body>
<tu><tuv xml:lang="en-US"><seg>Save <bpt i="1">&lt;b&gt;</bpt>all</seg></tuv>
<tuv xml:lang="de"><seg>Alles sichern</seg></tuv></tu>
<tu><tuv xml:lang="en-US"><seg>Only French</seg></tuv><tuv xml:lang="fr"><seg>Seul</seg></tuv></tu>
</body></tmx>"""


def sides(path: Path, **options: str) -> list[tuple[str, str]]:
    found = read_pairs(path, **({"source": "en", "target": "de"} | options))
    return [(p.source, p.target) for p in found]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_tsv_reads_the_same_plain_and_compressed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.tsv{suffix}"
    path.write_bytes(compress("\ufeffSave\tSichern\nÖl\tOil\textra\n".encode(), suffix))
    assert sides(path) == [("Save", "Sichern"), ("Öl", "Oil")]
    pair = next(read_pairs(path, source="en", target="de", licence="CC0-1.0"))
    assert (pair.source_language, pair.target_language) == ("eng_Latn", "deu_Latn")
    assert (pair.origin, pair.licence) == (path.name, "CC0-1.0")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_many_lines_are_read_in_order(tmp_path: Path, suffix: str) -> None:
    lines = [f"line {i} {'ü' * (i % 50)}" for i in range(5000)]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress("\n".join(lines).encode(), suffix))
    assert [line for _, line in read_lines(path)] == lines


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_a_truncated_archive_is_named(tmp_path: Path, suffix: str) -> None:
    whole = compress(b"".join(b"%d\t%d\n" % (i, i * i) for i in range(3000)), suffix)
    path = tmp_path / f"a.tsv{suffix}"
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(UserError, match=r"a\.tsv.*damaged or cut short.*download or compress"):
        sides(path)


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_a_file_that_is_not_an_archive_is_named(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.tsv{suffix}").write_bytes(b"plain\ttext\n")
    with pytest.raises(UserError, match="damaged or cut short"):
        sides(tmp_path / f"a.tsv{suffix}")


def test_bytes_that_are_not_utf8_are_named_with_line_and_column(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes("gut\tgood\nschön\tnice\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.tsv, line 2: not UTF-8 \(bytes f6.*column 4.*iconv"):
        sides(tmp_path / "a.tsv")


def test_a_line_with_too_few_columns_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("a\tb\n\nonly one\n")
    with pytest.raises(UserError, match=r"line 3: found 1 column.*at least 2.*only one"):
        sides(tmp_path / "a.tsv")


@pytest.mark.parametrize("name", ["a.tsv", "a.jsonl", "a.tmx", "a.po", "a.mo"])
def test_an_empty_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=rf"{name}.*(empty|not well-formed)"):
        sides(tmp_path / name)


def test_a_missing_file_an_unknown_format_and_no_languages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        sides(tmp_path / "nothing")
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(UserError, match=r'unknown format ".docx": expected one of .tsv'):
        sides(tmp_path / "a.docx")
    with pytest.raises(UserError, match="source and target"):
        list(read_pairs(tmp_path / "a.tsv"))


def test_the_shapes_of_jsonl_are_read(tmp_path: Path) -> None:
    rows = [
        {"src": "Save", "tgt": "Sichern", "src_lang": "en", "tgt_lang": "de"},
        {"translation": {"en": "Open", "de": "Öffnen"}},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in rows))
    assert sides(path, source="", target="") == [("Save", "Sichern"), ("Open", "Öffnen")]
    assert sides(path, source="de", target="en")[1] == ("Öffnen", "Open")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected an object"),
        ('{"a": 1}', 'found keys a, expected "src"'),
        ('{"src": "x", "tgt": 3, "src_lang": "en", "tgt_lang": "de"}', "found 3, expected a text"),
        ('{"src": "x", "tgt": "y", "src_lang": "qqq9", "tgt_lang": "de"}', "unknown language"),
        ('{"src": "x", "tgt": "y"}', "no language"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path: Path, line: str, why: str) -> None:
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=rf"a\.jsonl, line 1: .*{why}"):
        sides(tmp_path / "a.jsonl", source="", target="")


def test_moses_files_are_paired_by_line(tmp_path: Path) -> None:
    (tmp_path / "news.en.gz").write_bytes(compress(b"one\ntwo\n", ".gz"))
    (tmp_path / "news.deu_Latn").write_text("eins\nzwei\n")
    assert sides(tmp_path / "news") == [("one", "eins"), ("two", "zwei")]


@pytest.mark.parametrize(("en", "de"), [("one\n", "eins\nzwei\ndrei\n"), ("a\nb\nc\n", "x\n")])
def test_moses_files_of_different_length_are_refused(tmp_path: Path, en: str, de: str) -> None:
    (tmp_path / "news.en").write_text(en)
    (tmp_path / "news.de").write_text(de)
    with pytest.raises(UserError, match=r": 1 lines, but .* has 3: the two must match"):
        sides(tmp_path / "news")


def test_a_missing_moses_side_is_named(tmp_path: Path) -> None:
    (tmp_path / "news.en").write_text("a\n")
    with pytest.raises(UserError, match="no file for deu_Latn"):
        sides(tmp_path / "news")


def test_a_po_yields_translated_entries_only(tmp_path: Path) -> None:
    path = tmp_path / "a.po"
    path.write_text(PO, encoding="utf-8")
    assert sides(path) == [
        ('Open "%s"', "„%s“ öffnen"),
        ("%d file", "%d Datei"),
        ("%d files", "%d Dateien"),
        ("Save all", "Alles speichern"),
    ]


def test_a_line_that_is_not_po_syntax_is_named() -> None:
    with pytest.raises(UserError, match=r"a\.po, line 2: found 'hello'"):
        list(parse_po(b'msgid "x"\nhello', name="a.po"))


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_mo_is_read_in_either_byte_order(order: str) -> None:
    messages = {
        b"": b"Content-Type: text/plain; charset=ISO-8859-1\n",
        b"menu\x04Open": "Öffnen".encode("latin-1"),
        b"%d file\0%d files": b"%d Datei\0%d Dateien",
        b"Empty": b"",
    }
    found = [(e.source, e.target) for e in parse_mo(mo_bytes(messages, order), name="a.mo")]
    plural = [("%d file", "%d Datei"), ("%d files", "%d Dateien")]
    assert found == [*plural, ("Open", "Öffnen")]


@pytest.mark.parametrize("size", [0, 2, 10, 40, 60, -1])
def test_a_damaged_mo_is_named(size: int) -> None:
    whole = mo_bytes({b"": b"charset=utf-8\n", b"Save": b"Sichern"})
    damaged = whole[:size] if size >= 0 else b"GIF89a" + whole
    with pytest.raises(UserError, match=r"a\.mo: (empty|not a compiled|cut short)"):
        list(parse_mo(damaged, name="a.mo"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_tmx_yields_units_with_both_languages(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.tmx{suffix}"
    path.write_bytes(compress(TMX.encode(), suffix))
    assert sides(path) == [("Save all", "Alles sichern")]
    with pytest.raises(UserError, match="its languages are deu_Latn, eng_Latn, fra_Latn"):
        sides(path, target="ja")


def test_a_tmx_cut_short_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.tmx").write_text(TMX[:-30])
    with pytest.raises(UserError, match="not well-formed XML, perhaps cut short"):
        sides(tmp_path / "a.tmx")


def test_texts_are_read_from_lines_and_objects(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("eins\n\nzwei\n")
    (tmp_path / "a.jsonl").write_text('{"text": "drei"}\n')
    found = [t.text for n in ("a.txt", "a.jsonl") for t in read_texts(tmp_path / n, code="de")]
    assert found == ["eins", "zwei", "drei"]


@settings(deadline=None)
@given(st.text())
def test_an_escaped_field_is_one_field_of_one_line_and_unescapes_to_itself(text: str) -> None:
    field = escape_field(text)
    assert not set("\t\n\r") & set(field)
    assert unescape_field(field) == text


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_a_po_string_is_unescaped(text: str) -> None:
    entry = polib.POEntry(msgid="x", msgstr=text)
    found = [e.target for e in parse_po(f"{entry}\n".encode(), name="a.po")]
    assert found == ([text] if text else [])


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.po", 'msgid "a"\nmsgstr "b"\n', "a PO catalogue.*give its source and target"),
        ("a.tmx.gz", "<tmx/>", "a TMX file.*give its source and target"),
        ("a.tsv", "a\tb\n", "a resource file.*give its source and target"),
        ("a.srt", "1\n", "a subtitle file.*take the texts out"),
        ("a.txt", "1\n00:00:01,000 --> 00:00:02,000\nHello\n", "a subtitle file"),
        ("a.txt", "<!DOCTYPE html><p>Hello</p>", "HTML or XML"),
        ("a.txt", "%PDF-1.4\n", "a document or an archive"),
        ("a", 'msgid "a"\nmsgstr "b"\n', "a PO catalogue"),
        ("a.ts", "<ts/>", "HTML or XML"),
        ("a.png", "\0", "a picture"),
    ],
)
def test_a_text_in_one_language_is_no_catalogue_subtitle_or_markup(
    tmp_path: Path, name: str, content: str, why: str
) -> None:
    path, data = tmp_path / name, content.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(UserError, match=rf"{name}: {why}"):
        list(read_texts(path, code="de"))


def test_a_language_as_suffix_is_no_format(tmp_path: Path) -> None:
    (tmp_path / "news.ts").write_text("Ndzi khensa\n", encoding="utf-8")
    assert [t.text for t in read_texts(tmp_path / "news.ts", code="ts")] == ["Ndzi khensa"]


@pytest.mark.parametrize(
    ("content", "why"),
    [("1\n00:00:01,000 --> 00:00:02,000\nHi\n", "subtitle"), ("<?xml version='1.0'?>\n", "XML")],
)
def test_aligned_files_are_plain_text(tmp_path: Path, content: str, why: str) -> None:
    for side in ("en", "de"):
        (tmp_path / f"film.{side}").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=rf"film\.en: .*{why}.*expected text in one language"):
        list(read_pairs(tmp_path / "film", source="en", target="de"))
    (tmp_path / "a.tsv").write_text("a\tb\n", encoding="utf-8")
    first, second = tmp_path / "a.tsv", tmp_path / "a.tsv"
    with pytest.raises(UserError, match=r"a\.tsv: a resource file"):
        list(read_aligned(first, second, source="eng_Latn", target="deu_Latn"))
