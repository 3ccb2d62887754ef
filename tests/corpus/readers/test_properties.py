import pytest

from moesaic.core.errors import UserError
from moesaic.corpus.readers import limits
from moesaic.corpus.readers.properties import parse_properties


def read(text: str) -> dict[str, str]:
    return {
        k.key: k.text for k in parse_properties(enumerate(text.split("\n"), 1), name="a.properties")
    }


@pytest.mark.parametrize(
    "line", ["key=text", "key = text", "key: text", "  key text", "key\t=text"]
)
def test_keys_and_texts_are_separated_as_in_java(line: str) -> None:
    assert read(line) == {"key": "text"}


def test_comments_and_blank_lines_are_skipped() -> None:
    assert read("# a=1\n! b=2\n\n  # c=3\nd=4") == {"d": "4"}


def test_a_line_continues_after_a_backslash_without_indent() -> None:
    assert read("a = one \\\n    two\\\n three\nb = c\\\\\nd = e") == {
        "a": "one twothree",
        "b": "c\\",
        "d": "e",
    }


def test_escapes_are_decoded_in_keys_and_texts() -> None:
    assert read(r"a\ b\=c = x\ty\nz\u00e9\u20AC\d") == {"a b=c": "x\ty\nzé€d"}
    assert read("a = \\ud83d\\ude00 \\ud83d") == {"a": "\U0001f600 \ufffd"}


def test_a_text_may_be_empty_and_the_last_line_may_end_in_a_backslash() -> None:
    assert read("a =\nb\nc = x\\") == {"a": "", "b": "", "c": "x"}


def test_continued_lines_take_linear_time_and_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read("a = " + "\\\\\\\n" * 100_000 + "x")["a"] == "\\" * 100_000 + "x"
    monkeypatch.setattr(limits, "MAX_LINE_BYTES", 100)
    with pytest.raises(UserError, match=r"line 2: with the lines that continue it longer than 100"):
        read("a = b\nc = " + "x\\\n" * 60)


def test_a_wrong_escape_is_named_with_its_line() -> None:
    with pytest.raises(UserError, match=r"a\.properties, line 2: found '\\\\u12'.*four hexa"):
        read("a = b\nc = \\u12")
