"""Gettext message catalogues, ``.po`` and ``.mo``, read with polib.

Only translated entries are yielded: fuzzy, obsolete and untranslated ones are left out, contexts
are dropped, and of plural forms the first is taken.
"""

import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import polib

from moesaic.core.errors import DataError
from moesaic.corpus.readers.text_lines import decode_utf8

_MO_BYTE_ORDERS = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}
_DEFAULT = re.compile(r'Default:\s*"?(.*?)"?\s*', re.DOTALL)
_SYNTAX_ERROR = re.compile(r"\(line (\d+)\)")


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """A message and its translation.

    ``source`` is the English text also where the message is a key (``#. Default: ...``).
    """

    source: str
    target: str


class _PoText(str):
    """The text of a .po file. polib's ``splitlines`` must not split at U+2028 and the like."""

    __slots__ = ()

    def splitlines(self, *_: object) -> list[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.split("\n")


def parse_po(data: bytes, *, name: str) -> Iterator[CatalogueEntry]:
    """Yield the translated entries of a .po file; ``name`` is for errors.

    Raises DataError with file and line where the text is not PO syntax.
    """
    text = decode_utf8(data, path=name)
    try:
        catalogue = polib.pofile(_PoText(text), encoding="utf-8")
    except OSError as error:
        line = _SYNTAX_ERROR.search(str(error))
        found = text.split("\n")[int(line[1]) - 1].strip() if line else ""
        where = f"{name}, line {line[1]}" if line else name
        raise DataError(
            f"{where}: found {found[:50]!r}, expected msgid, msgstr, a comment or a quoted string"
        ) from error
    return _translated(entry for entry in catalogue if not entry.obsolete and not entry.fuzzy)


def parse_mo(data: bytes, *, name: str) -> Iterator[CatalogueEntry]:
    """Yield the translated entries of a .mo file; ``name`` is for errors.

    Raises DataError when the bytes are not a compiled catalogue, or are cut short.
    """
    if not data:
        raise DataError(f"{name}: empty, expected a compiled catalogue (.mo)")
    order = _MO_BYTE_ORDERS.get(data[:4])
    if order is None:
        raise DataError(f"{name}: not a compiled catalogue: it starts with {data[:4].hex(' ')}")
    try:
        _check_complete(data, order=order, name=name)
        return _translated(polib.mofile(data))  # pyright: ignore[reportArgumentType]
    except (OSError, struct.error) as error:
        raise DataError(f"{name}: cut short: its tables end too early ({error})") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: a text cannot be decoded as {error.encoding}: {error.reason}"
        ) from error


def _check_complete(data: bytes, *, order: str, name: str) -> None:
    """polib reads texts beyond the end of the file as shorter ones."""
    _, count, *tables = struct.unpack_from(f"{order}4I", data, 4)
    for table in tables:
        spans = struct.unpack_from(f"{order}{2 * count}I", data, table)
        if any(size + start > len(data) for size, start in zip(*[iter(spans)] * 2, strict=True)):
            raise DataError(f"{name}: cut short: {len(data)} bytes, but a text ends beyond them")


def _translated(entries: Iterable[polib.POEntry | polib.MOEntry]) -> Iterator[CatalogueEntry]:
    for entry in entries:
        target = entry.msgstr_plural.get(0, "") if entry.msgstr_plural else entry.msgstr
        if entry.msgid and target:
            default = _DEFAULT.fullmatch(" ".join((entry.comment or "").split("\n")))
            yield CatalogueEntry((default and default[1]) or entry.msgid, target)
