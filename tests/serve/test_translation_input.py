import gzip
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.core.errors import DataError
from moesaic.corpus.readers.plain_text import REFUSED_FORMATS
from moesaic.serve import translation_input
from moesaic.serve.translation_input import (
    read_lines_to_translate,
    read_stream_to_translate,
)

INSIDE = "\r\x00\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # str.splitlines divides at each of them
CATALOGUE = 'msgid "Open"\nmsgstr "Öffnen"\n'
SUBTITLES = "1\n00:00:01,000 --> 00:00:02,500\nHello\n"
BY_CONTENT = {
    "PO": "# German\n" + CATALOGUE,
    "PO without a comment, plural": 'msgid "%d file"\nmsgid_plural "%d files"\nmsgstr[0] ""\n',
    "PO of more lines": 'msgid ""\n"Open "\n"file"\nmsgstr ""\n',
    "subtitles": SUBTITLES,
    "WebVTT": "WEBVTT\n\n00:01.000 --> 00:02.000\nHello\n",
    "JSON": '{"open": "Open"}\n',
    "JSON of several lines": '{\n  "a": {\n    "b": "c"\n  }\n}\n',
    "JSON lines": '{"src": "Open", "trg": "Öffnen"}\n{"src": "Save", "trg": "Sichern"}\n',
    "JSON list": '["Open", "Save"]\n',
    "XML": '<?xml version="1.0"?>\n<resources/>\n',
    "XLIFF": '<xliff version="1.2">\n',
    "HTML": "<!DOCTYPE html>\n<html><body>Hi</body></html>\n",
    "PDF": "%PDF-1.7\n",
    "zip": "PK\x03\x04rest\n",
}


def _read(text, **how):
    raw = text if isinstance(text, bytes) else text.encode()
    return read_stream_to_translate(io.BytesIO(raw), name="standard input", **how)


def test_only_a_line_feed_ends_a_line(tmp_path):
    lines = [f"one{c}two" for c in INSIDE] + ["", "last"]
    text = "\n".join(lines) + "\n"
    assert _read(text) == lines
    (tmp_path / "x.txt").write_bytes(text.encode())
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert read_lines_to_translate(tmp_path / "x.txt") == lines
    assert read_lines_to_translate(tmp_path / "x.txt.gz") == lines


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.text(alphabet=f"ab é{INSIDE}", max_size=6).map(lambda t: t.rstrip("\r"))))
def test_there_are_as_many_lines_as_line_feeds(lines):
    text = "".join(f"{line}\n" for line in lines)
    assert _read(text) == lines
    assert len(_read(text.removesuffix("\n"))) == (len(lines) - (lines[-1:] == [""]) if text else 0)


def test_a_byte_order_mark_and_carriage_returns_at_line_ends_are_left_out():
    assert _read("\ufeffone\r\ntwo\r\n") == ["one", "two"]
    assert _read("one\n\ufefftwo") == ["one", "\ufefftwo"]  # the text rules remove it there
    assert _read("") == []


def test_a_file_whose_lines_end_in_carriage_returns_has_as_many_answers():
    assert _read("one\rtwo\r\rfour\r") == ["one", "two", "", "four"]
    assert _read("one\rtwo\r\n") == ["one\rtwo"]


def test_bytes_that_are_not_utf8_are_named_with_their_line():
    with pytest.raises(DataError, match=r"standard input, line 3: not UTF-8 \(bytes e9"):
        _read(b"one\n\ntwo \xe9\n")
    with pytest.raises(DataError, match="line 1: not UTF-8"):
        _read("one\ntwo\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"line 1: not UTF-8.*UTF-16"):
        _read("Open the file\ntwo\n".encode("utf-16-le"))


@pytest.mark.parametrize("suffix", [s for known in REFUSED_FORMATS for s in known.suffixes])
def test_a_file_that_is_no_text_is_refused_by_its_suffix(tmp_path, suffix):
    for name in (f"a{suffix}", f"A{suffix.upper()}", f"a{suffix}.gz"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(b"Open\n") if name.endswith(".gz") else b"Open\n")
        with pytest.raises(DataError, match=r"one on a line.*--as-text"):
            read_lines_to_translate(path)
        assert read_lines_to_translate(path, as_text=True) == ["Open"]


@pytest.mark.parametrize("kind", BY_CONTENT)
def test_a_stream_that_is_no_text_is_refused_by_its_beginning(kind, tmp_path):
    text = BY_CONTENT[kind]
    for given_text in (text, "\ufeff" + text, "\n" + text, text.replace("\n", "\r\n")):
        with pytest.raises(DataError, match="expected plain text"):
            _read(given_text)
    (tmp_path / "x.txt").write_text(text)
    with pytest.raises(DataError, match=r"x\.txt: .*expected plain text"):
        read_lines_to_translate(tmp_path / "x.txt")
    assert _read(text, as_text=True) == text.removesuffix("\n").split("\n")


@pytest.mark.parametrize(
    "text",
    [
        '[1] "Open" and {name}',
        '["Open" is a word',
        "{count} files {0}",
        "{}",
        "<b>Open</b> the <file>",
        "msgid is a keyword\nmsgstr too",
        "At 00:00:01 --> go",
        "<title>",
        '"quoted", "twice"',
        "# a heading",
        "BZ is short",
    ],
)
def test_text_with_a_little_markup_is_text(text):
    assert _read(text + "\n") == text.split("\n")


def test_input_beyond_all_reason_is_refused(monkeypatch):
    monkeypatch.setattr(translation_input, "MAX_INPUT_BYTES", 1 << 20)
    with pytest.raises(DataError, match="more than 1 MiB"):
        _read("a" * (1 << 20) + "\n")


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_lines_or_refused(raw):
    try:
        lines = _read(raw)
    except DataError:
        return
    assert len(lines) == raw.count(b"\n") + (not raw.endswith(b"\n") and raw != b"")
