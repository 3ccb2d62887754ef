"""TSV files: columns separated by tabs; tab, newline and backslash are escaped."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moesaic.core.errors import DataError
from moesaic.corpus.readers.text_lines import read_lines

_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
_TABLE = str.maketrans(_ESCAPES)
_BACK = {"\\": "\\", "t": "\t", "n": "\n", "r": "\r"}


@dataclass(frozen=True, slots=True)
class TsvRow:
    """A line's number and its fields."""

    line: int
    fields: tuple[str, ...]


def escape_field(text: str) -> str:
    """Escape a text for a field of a line."""
    if "\\" not in text and text.isprintable():
        return text
    return text.translate(_TABLE)


def unescape_field(text: str) -> str:
    """Undo ``escape_field``; a backslash before anything else stays as it is."""
    if "\\" not in text:
        return text
    parts, i = [], 0
    while (j := text.find("\\", i)) >= 0:
        nxt = text[j + 1 : j + 2]
        parts += [text[i:j], _BACK.get(nxt, "\\" + nxt)]
        i = j + 2
    return "".join([*parts, text[i:]])


def read_rows(path: Path, *, columns: int) -> Iterator[TsvRow]:
    """Yield rows of at least ``columns`` fields, blank lines left out, fields as written.

    Raises DataError naming file and line when a line has fewer.
    """
    for number, line in read_lines(path):
        if not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) < columns:
            raise DataError(
                f"{path}, line {number}: found {len(fields)} column(s), expected at least "
                f"{columns} separated by tabs: {line[:60]!r}"
            )
        yield TsvRow(number, tuple(fields))
