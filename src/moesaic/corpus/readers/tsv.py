"""TSV files: columns separated by tabs; tab, newline and backslash are escaped.

Quotes are text. Only a file that as a whole is written with the quotes of CSV, as pandas and Excel
do, is read by its rules: ``read_user_rows``.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from moesaic.core.errors import DataError
from moesaic.corpus.readers import limits
from moesaic.corpus.readers.text_lines import read_lines

_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
_TABLE = str.maketrans(_ESCAPES)
# a record of a CSV file with tabs: a quote stands at the ends of a field, and doubled within
_QUOTED = r'"(?:[^"]++|"")*+"(?!")'
_RECORD = re.compile(rf'(?:{_QUOTED}|[^"\t]*+)(?:\t(?:{_QUOTED}|[^"\t]*+))*+')
_FIELD = re.compile(rf'(?:^|(?<=\t))({_QUOTED}|[^"\t]*+)(?=\t|\Z)')
_MAX_RECORD_LINES = 1000
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
        if line.strip():
            yield _row(path, number, line.split("\t"), columns=columns)


def read_user_rows(path: Path, *, columns: int) -> Iterator[TsvRow]:
    """Yield the rows of a file that others wrote; its CSV quotes, if it has them, are undone.

    Only a file with a quote is read twice: whether its quotes are CSV's depends on all of them.
    """
    lines = read_lines(path)
    for number, line in lines:
        if '"' in line:
            break
        if line.strip():
            yield _row(path, number, line.split("\t"), columns=columns)
    else:
        return
    rest = chain([(number, line)], lines)
    if not _is_csv_quoted(_records(read_lines(path))):
        rows = ((number, line.split("\t")) for number, line in rest if line.strip())
    else:
        rows = ((number, _csv_fields(text)) for number, text in _records(rest) if text.strip())
    for number, fields in rows:
        yield _row(path, number, fields, columns=columns)


def _row(path: Path, number: int, fields: list[str], *, columns: int) -> TsvRow:
    if len(fields) < columns:
        line = "\t".join(fields)
        raise DataError(
            f"{path}, line {number}: found {len(fields)} column(s), expected at least "
            f"{columns} separated by tabs: {line[:60]!r}"
        )
    return TsvRow(number, tuple(fields))


def _is_csv_quoted(records: Iterable[tuple[int, str]]) -> bool:
    """Whether a file is written with CSV quotes.

    Every quote must stand where CSV has it, and some field must need its quotes: a doubled quote, a
    tab or a line break within, or all fields of all rows (two at least) are quoted.
    """
    certain, all_quoted, rows = False, True, 0
    for _, record in records:
        if not record.strip():
            continue
        rows += 1
        if '"' not in record:
            all_quoted = False
        elif _RECORD.fullmatch(record) is None:
            return False
        elif not certain:
            fields = [match[1] for match in _FIELD.finditer(record)]
            certain = any(_needs_quotes(field) for field in fields)
            all_quoted = all_quoted and all(field.startswith('"') for field in fields)
    return certain or (all_quoted and rows > 1)


def _needs_quotes(field: str) -> bool:
    inner = field[1:-1] if field.startswith('"') else ""
    return any(mark in inner for mark in ('""', "\t", "\n"))


def _records(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Yield (first line, record): a line, or several where a quote is open at its end."""
    held: list[str] = []
    first, quotes, size = 0, 0, 0
    for number, line in lines:
        first = first if held else number
        held.append(line)
        quotes, size = quotes + line.count('"'), size + len(line)
        is_long = len(held) >= _MAX_RECORD_LINES or size > limits.MAX_LINE_BYTES
        if quotes % 2 == 0 or is_long:
            yield first, "\n".join(held)
            held, quotes, size = [], 0, 0
    if held:
        yield first, "\n".join(held)


def _csv_fields(record: str) -> list[str]:
    return [_unquoted(match[1]) for match in _FIELD.finditer(record)]


def _unquoted(field: str) -> str:
    return field[1:-1].replace('""', '"') if field.startswith('"') else field
