"""A bounded fuzz of every reader: whatever a file holds, there are rows or an error in words.

The readers are found by walking the package, so that a new one cannot be left out.
"""

import functools
import importlib
import inspect
import json
import pkgutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from catalogue_files import compress, mo_bytes
from hypothesis import given
from hypothesis import strategies as st

import moesaic.corpus.readers
from fuzz_settings import bounded
from moesaic.core.errors import UserError
from moesaic.corpus.readers.compressed import COMPRESSED
from moesaic.corpus.readers.documents import (
    EachLine,
    EachParagraph,
    JsonFields,
    WholeFile,
    read_json_documents,
    read_text_documents,
)
from moesaic.corpus.readers.fluent import parse_fluent
from moesaic.corpus.readers.formats import PAIR_READERS, read_pairs, read_texts
from moesaic.corpus.readers.gettext import parse_mo, parse_po
from moesaic.corpus.readers.plural_forms import FormulaError, parse_plural_forms
from moesaic.corpus.readers.po_syntax import parse_messages
from moesaic.corpus.readers.properties import parse_properties
from moesaic.corpus.readers.text_lines import read_all_bytes, read_lines
from moesaic.corpus.readers.tsv import read_rows, read_user_rows
from moesaic.corpus.readers.udhr_page import parse_udhr

Door = Callable[[Path], Iterable[object]]

PO = (
    b'msgid ""\nmsgstr "Content-Type: text/plain; charset=UTF-8\\n"\n'
    b'"Plural-Forms: nplurals=2; plural=n != 1;\\n"\n\n#. Default: "x"\n#, fuzzy\nmsgid "a_b"\n'
    b'msgstr "c"\n\nmsgctxt "m"\nmsgid "one"\nmsgid_plural "many"\nmsgstr[0] "\\303\\244"\n'
    b'msgstr[1] "\\xc3\\xa4"\n\nmsgid "_n: a\\nb"\nmsgstr "c\\nd"\n#~ msgid "z"\n'
)
TMX = (
    b'<?xml version="1.0"?><tmx version="1.4"><header/><body><tu><tuv xml:lang="en"><seg>Save <ph>'
    b'&lt;b&gt;</ph>all</seg></tuv><tuv xml:lang="de-AT"><seg>Alles</seg></tuv></tu></body></tmx>'
)
FORMULA = b"nplurals=3; plural=(n%10==1 && n%100!=11 ? 0 : n%10>=2 || !n ? 1 : 2);"
FLUENT = (
    b'a = Text { $x } { NUMBER($n) } { -t(case: "g") }\n    .title = { "\\u00e9" }\n-t = Brand\n'
    b"b = { $n ->\n    [one] { a }\n   *[other] { $n } things\n }\n"
)
UDHR = (
    b'<html lang="de" data-code="deu" data-iso6393="deu"><header><p>Pre</p></header>'
    b'<article data-number="1"><p>All</p></article></html>'
)
JSONL = b'{"src": "a", "tgt": "b"}\n{"translation": {"en": "a\\ud83d", "de": "b", "score": 1}}\n'
TSV = b'"She ""said"""\tb\n"one\ntwo"\tx\n'


def _pairs(suffix: str) -> Door:
    def read(path: Path) -> Iterable[object]:
        named = path.with_suffix(suffix)
        named.write_bytes(path.read_bytes())
        return read_pairs(named, source="en", target="de-AT")

    return read


def _moses(path: Path) -> Iterable[object]:
    for side in ("en", "de"):
        path.with_suffix(f".{side}").write_bytes(path.read_bytes())
    return read_pairs(path.with_suffix(""), source="en", target="de")


def _texts(path: Path) -> Iterable[object]:
    named = path.with_suffix(".jsonl")
    named.write_bytes(path.read_bytes())
    return read_texts(named, code="de")


def _formula(path: Path) -> Iterable[object]:
    try:
        return [parse_plural_forms(path.read_text(encoding="latin-1"))]
    except FormulaError:
        return []


def _decoded(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


# module -> (a valid file, how it is read); none where ``formats`` reads through the module
DOORS: dict[str, list[tuple[bytes, Door]]] = {
    "compressed": [],  # the suffixes below
    "documents": [
        (b"a\n\nb\r\n", functools.partial(read_text_documents, unit=unit))
        for unit in (WholeFile(), EachLine(), EachParagraph())
    ]
    + [
        (
            b'{"text": "a", "lang": "de", "x": "y"}\n',
            lambda path: read_json_documents(path, fields=JsonFields("text", "lang", "x")),
        )
    ],
    "encodings": [(("Öffne die Tür\n" * 4).encode("latin-1"), read_lines)],
    "fluent": [(FLUENT, lambda path: parse_fluent(_decoded(path)))],
    "formats": [(b"a\r\nb\n", _moses), (b'{"text": "a"}\n', _texts)],
    "gettext": [
        (PO, lambda path: parse_po(path.read_bytes(), name=str(path))),
        (
            mo_bytes({b"": b"Content-Type: text/plain; charset=UTF-8\n", b"a\0b": b"c\0d"}),
            lambda path: parse_mo(path.read_bytes(), name=str(path)),
        ),
    ],
    "jsonl": [],
    "moses": [],
    "plural_forms": [(FORMULA, _formula)],
    "po_syntax": [(PO, lambda path: parse_messages(_decoded(path), charset="utf-8", name="a.po"))],
    "properties": [
        (b"a = b\\u00e9 \\\n c\n# d\n", lambda path: parse_properties(read_lines(path), name="a"))
    ],
    "text_lines": [(b"a\r\nb\rc\n", read_lines), (b"a", lambda path: [read_all_bytes(path)])],
    "tmx": [],
    "tsv": [
        (b"a\tb\tc\n", lambda path: read_rows(path, columns=2)),
        (TSV, lambda path: read_user_rows(path, columns=2)),
    ],
    "udhr_page": [(UDHR, lambda path: [parse_udhr(_decoded(path), name="a")])],
}
EXAMPLES = {".tsv": TSV, ".jsonl": JSONL, ".po": PO, ".tmx": TMX, ".mo": DOORS["gettext"][1][0]}
DOORS["formats"] += [(EXAMPLES[suffix], _pairs(suffix)) for suffix in PAIR_READERS]
EVERY = [
    pytest.param(valid, read, id=f"{module}-{number}")
    for module, doors in DOORS.items()
    for number, (valid, read) in enumerate(doors)
]
EXAMPLES_EACH = bounded(20)


def test_every_reader_is_fuzzed() -> None:
    found = set()
    for module in pkgutil.iter_modules(moesaic.corpus.readers.__path__):
        loaded = importlib.import_module(f"moesaic.corpus.readers.{module.name}")
        for name, member in inspect.getmembers(loaded, callable):
            if name.startswith(("read_", "parse_", "open_", "advise_")):
                found.add(member.__module__.rpartition(".")[2])
    assert found == set(DOORS)


def read_or_refuse(read: Door, path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        rows: list[object] = list(read(path))
    except UserError as error:
        rows = [str(error)]
        longest = 1_000 + len(str(path))
    else:
        longest = 1 << 20
    for row in rows:
        assert len(repr(row).encode("utf-8")) < longest


@pytest.mark.parametrize(("valid", "read"), EVERY)
def test_a_valid_file_is_read(valid: bytes, read: Door, tmp_path: Path) -> None:
    (tmp_path / "a.x").write_bytes(valid)
    if read is not read_lines or b"\xd6" not in valid:
        assert list(read(tmp_path / "a.x"))


@pytest.mark.parametrize(("valid", "read"), EVERY)
@EXAMPLES_EACH
@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(
    valid: bytes, read: Door, tmp_path: Path, data: bytes
) -> None:
    read_or_refuse(read, tmp_path / "a.x", data)
    read_or_refuse(read, tmp_path / "a.x", valid[: len(valid) // 2] + data)


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Return a change of a file: pieces of it replaced, removed, repeated or moved."""
    places = draw(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 30)), min_size=1, max_size=4))
    piece = draw(
        st.one_of(
            st.binary(max_size=6),
            st.sampled_from([b"", b"\0", b"\n", b'"', b"\\", b"\xff", b"{", b"<", b"\xed\xa0\x80"]),
            st.sampled_from([b"\xff\xff\xff\xff", b"\\ud83d", b"\r", b"&#xD800;", b"9" * 5000]),
        )
    )
    repeat = draw(st.sampled_from([1, 1, 2, 300]))

    def change(data: bytes) -> bytes:
        for share, length in places:
            at = int(share * len(data))
            data = data[:at] + piece * repeat + data[at + length :]
        return data

    return change


@pytest.mark.parametrize(("valid", "read"), EVERY)
@EXAMPLES_EACH
@given(change=mutations())
def test_a_damaged_file_is_read_or_refused(
    valid: bytes, read: Door, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    read_or_refuse(read, tmp_path / "a.x", change(valid))


NESTS = [
    ("[", "]"),
    ('{"a":', "}"),
    ("<hi>", "</hi>"),
    ("<div>", "</div>"),
    ("<article data-number='1'>", "</article>"),
    ("{ ", " }"),
    ("{ $a ->\n *[b] ", "\n }"),
    ("{ -a(b: ", ") }"),
    ("(", ")"),
    ("!", ""),
    ('"', '"'),
    ("\\", ""),
]


@pytest.mark.parametrize(("valid", "read"), EVERY)
@pytest.mark.parametrize("depth", [40, 3_000])
def test_a_nested_file_is_read_or_refused(
    valid: bytes, read: Door, tmp_path: Path, depth: int
) -> None:
    # the place of a text in a file of each format
    around = [(b"Save", b""), (b'"a"', b'"'), (b"n%10", b""), (b"Text", b""), (b"All", b"")]
    limit = sys.getrecursionlimit()
    for opening, closing in NESTS:
        nested = (opening * depth + "x" + closing * depth).encode()
        read_or_refuse(read, tmp_path / "a.x", nested)
        for place, _ in around:
            if place in valid:
                read_or_refuse(read, tmp_path / "a.x", valid.replace(place, nested, 1))
    assert sys.getrecursionlimit() == limit


@pytest.mark.parametrize("suffix", COMPRESSED)
@EXAMPLES_EACH
@given(change=mutations())
def test_a_damaged_archive_is_read_or_refused(
    suffix: str, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    data = compress(json.dumps({"src": "a" * 100, "tgt": "b"}).encode(), suffix)
    path = tmp_path / f"a.jsonl{suffix}"
    read_or_refuse(lambda p: read_pairs(p, source="en", target="de"), path, change(data))
