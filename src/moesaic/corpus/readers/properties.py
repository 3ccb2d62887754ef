"""Properties files of Java and Mozilla: ``key = text`` (java.util.Properties, in UTF-8)."""

import re
from collections.abc import Iterable, Iterator

from moesaic.core.errors import DataError
from moesaic.corpus.readers.keyed_text import KeyedText
from moesaic.corpus.readers.text_lines import replace_lone_surrogates

_KEY = re.compile(r"((?:[^\\=:\s]|\\.)*)[ \t\f]*[=: \t\f]?[ \t\f]*(.*)", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|(.))", re.DOTALL)
_SIMPLE = {"n": "\n", "t": "\t", "r": "\r", "f": "\f"}
_BLANK = " \t\f"


def parse_properties(lines: Iterable[tuple[int, str]], *, name: str) -> Iterator[KeyedText]:
    r"""Yield the texts of (number, line) pairs; a line that ends in ``\`` continues in the next.

    Raises DataError with file and line on a ``\u`` that four hexadecimal digits do not follow.
    """
    joined, first_line = "", 0
    for number, line in lines:
        text = line.rstrip("\r\n").lstrip(_BLANK)
        if not joined and (not text or text[0] in "#!"):
            continue
        first_line = first_line or number
        joined += text
        if _continues_on_next_line(joined):
            joined = joined[:-1]
            continue
        yield _property(joined, where=f"{name}, line {first_line}")
        joined, first_line = "", 0
    if joined:
        yield _property(joined, where=f"{name}, line {first_line}")


def _continues_on_next_line(text: str) -> bool:
    return (len(text) - len(text.rstrip("\\"))) % 2 == 1


def _property(line: str, *, where: str) -> KeyedText:
    match = _KEY.fullmatch(line)
    assert match is not None  # every part may be empty
    return KeyedText(_unescape(match[1], where=where), _unescape(match[2], where=where))


def _unescape(text: str, *, where: str) -> str:
    if "\\" not in text:
        return text

    def replace(match: re.Match[str]) -> str:
        code, simple = match.groups()
        if code:
            return chr(int(code, 16))
        if simple == "u":
            found = text[match.start() : match.start() + 6]
            raise DataError(f"{where}: found {found!r}, expected \\u and four hexadecimal digits")
        return _SIMPLE.get(simple, simple)

    return replace_lone_surrogates(_ESCAPE.sub(replace, text))
