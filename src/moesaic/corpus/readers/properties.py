"""Properties files of Java and Mozilla: ``key = text`` (java.util.Properties, in UTF-8)."""

import re
from collections.abc import Iterable, Iterator

from moesaic.core.errors import DataError
from moesaic.corpus.readers import limits
from moesaic.corpus.readers.keyed_text import KeyedText
from moesaic.corpus.readers.text_lines import replace_lone_surrogates

_KEY = re.compile(r"((?:[^\\=:\s]++|\\.)*+)[ \t\f]*[=: \t\f]?[ \t\f]*(.*)", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|(.))", re.DOTALL)
_SIMPLE = {"n": "\n", "t": "\t", "r": "\r", "f": "\f"}
_BLANK = " \t\f"


def parse_properties(lines: Iterable[tuple[int, str]], *, name: str) -> Iterator[KeyedText]:
    r"""Yield the texts of (number, line) pairs; a line that ends in ``\`` continues in the next.

    Raises DataError with file and line on a ``\u`` that four hexadecimal digits do not follow.
    """
    parts: list[str] = []
    first_line, size, filled = 0, 0, False
    for number, line in lines:
        text = line.rstrip("\r\n").lstrip(_BLANK)
        if not filled and (not text or text[0] in "#!"):
            continue
        first_line, size = first_line or number, size + len(text)
        where = f"{name}, line {first_line}"
        if size > limits.MAX_LINE_BYTES:
            raise DataError(
                f"{where}: with the lines that continue it longer than "
                f"{limits.as_size(limits.MAX_LINE_BYTES)}, the limit of a line; divide the text"
            )
        continues = _continues_on_next_line(text)
        parts.append(text[:-1] if continues else text)
        filled = filled or bool(parts[-1])
        if not continues:
            yield _property("".join(parts), where=where)
            parts, first_line, size, filled = [], 0, 0, False
    if filled:
        yield _property("".join(parts), where=f"{name}, line {first_line}")


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
