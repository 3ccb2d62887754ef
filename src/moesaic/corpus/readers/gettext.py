"""Entry: one message of a catalogue and its translation.

MO: compiled gettext catalogues, read by their published layout (GNU gettext manual, 10.3).

PO: gettext catalogues as text. Fuzzy, obsolete and untranslated entries are left out.
"""

import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from moesaic.core.errors import DataError


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """``default`` is the English of a catalogue whose messages are keys (``#. Default: ...``)."""

    source: str
    target: str
    default: str = ""


_CHARSET = re.compile(rb"charset=([\w-]+)", re.IGNORECASE)


def parse_mo(data: bytes, *, name: str) -> Iterator[CatalogueEntry]:
    """Yield translated entries; context removed, first plural form only.

    ``name`` is for errors. Raises DataError when the bytes are no catalogue or are cut short.
    """
    if not data:
        raise DataError(f"{name}: empty, expected a compiled catalogue (.mo)")
    order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}.get(data[:4])
    if order is None:
        raise DataError(f"{name}: not a compiled catalogue: it starts with {data[:4].hex(' ')}")
    try:
        _, count, sources, targets = struct.unpack_from(f"{order}4I", data, 4)
        where = struct.Struct(f"{order}2I")
        spans = [
            (where.unpack_from(data, sources + 8 * i), where.unpack_from(data, targets + 8 * i))
            for i in range(count)
        ]
    except struct.error as error:
        raise DataError(f"{name}: cut short: its tables end too early") from error
    charset = "utf-8"
    for (source_size, source_at), (target_size, target_at) in spans:
        if max(source_at + source_size, target_at + target_size) > len(data):
            raise DataError(f"{name}: cut short: {len(data)} bytes, but a text lies beyond them")
        source = data[source_at : source_at + source_size]
        target = data[target_at : target_at + target_size]
        if not source:
            charset = _charset(target) or charset
            continue
        if not target:
            continue
        yield _decode_entry(source, target, charset=charset, name=name)


def _charset(header: bytes) -> str | None:
    found = _CHARSET.search(header)
    name = found[1].decode("ascii") if found else ""
    return None if name.upper() in ("", "CHARSET") else name


def _decode_entry(source: bytes, target: bytes, *, charset: str, name: str) -> CatalogueEntry:
    *_, msgid = source.split(b"\0", 1)[0].rpartition(b"\x04")
    try:
        return CatalogueEntry(msgid.decode(charset), target.split(b"\0", 1)[0].decode(charset))
    except (UnicodeDecodeError, LookupError) as error:
        raise DataError(f"{name}: a text cannot be decoded as {charset}: {error}") from error


_ESCAPE = re.compile(r"\\(?:([0-7]{1,3})|x([0-9A-Fa-f]{1,2})|(.))", re.DOTALL)


_SIMPLE = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}


_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"\s*$')


_KEYWORD = re.compile(r"(msgctxt|msgid_plural|msgid|msgstr(?:\[\d+\])?)\s*")


_DEFAULT = re.compile(r'Default:\s*"?(.*)', re.DOTALL)


@dataclass(slots=True)
class _OpenEntry:
    """The entry being read: its fields and its comments."""

    fields: dict[str, list[str]] = field(default_factory=dict)
    comments: list[str] = field(default_factory=list)
    fuzzy: bool = False
    current: str = ""

    def close(self) -> CatalogueEntry | None:
        source = "".join(self.fields.get("msgid", ()))
        target = "".join(self.fields.get("msgstr", self.fields.get("msgstr[0]", ())))
        if self.fuzzy or not source or not target:
            return None
        return CatalogueEntry(source, target, _default_text(self.comments))


def parse_po(lines: Iterable[tuple[int, str]], *, name: str) -> Iterator[CatalogueEntry]:
    """Yield translated entries of (number, line) pairs; context removed, first plural form only.

    Raises DataError with file and line on a line that is no PO syntax.
    """
    entry = _OpenEntry()
    for number, line in lines:
        text = line.strip()
        if _starts_next_entry(text, entry):
            done, entry = entry.close(), _OpenEntry()
            if done:
                yield done
        if text:
            _take_line(text, entry, where=f"{name}, line {number}")
    done = entry.close()
    if done:
        yield done


def unescape_po(text: str) -> str:
    r"""Decode the C escapes of a quoted string: ``\n``, ``\"``, ``\\``, octal and hex."""
    if "\\" not in text:
        return text

    def replace(match: re.Match[str]) -> str:
        octal, hexa, simple = match.groups()
        if octal:
            return chr(int(octal, 8))
        return chr(int(hexa, 16)) if hexa else _SIMPLE.get(simple, simple)

    return _ESCAPE.sub(replace, text)


def escape_po(text: str) -> str:
    """Write a text as the inside of a quoted string."""
    table = {"\\": "\\\\", '"': '\\"', **{v: f"\\{k}" for k, v in _SIMPLE.items()}}
    return text.translate(str.maketrans(table))


def _starts_next_entry(text: str, entry: _OpenEntry) -> bool:
    """An entry ends at a blank line, or where the next one's comments or first keyword begin."""
    if not entry.current.startswith("msgstr"):
        return not text and not entry.fields
    return not text or text.startswith(("#", "msgctxt", "msgid"))


def _take_line(text: str, entry: _OpenEntry, *, where: str) -> None:
    if text.startswith("#"):
        entry.fuzzy = entry.fuzzy or (text.startswith("#,") and "fuzzy" in text)
        if text.startswith("#."):
            entry.comments.append(text[2:].strip())
        return
    keyword = _KEYWORD.match(text)
    if keyword:
        entry.current = keyword[1]
        entry.fields[entry.current] = []
        text = text[keyword.end() :]
    quoted = _STRING.match(text)
    if quoted is None or not entry.current:
        raise DataError(
            f"{where}: found {text[:50]!r}, expected msgid, msgstr, a comment or a quoted string"
        )
    entry.fields[entry.current].append(unescape_po(quoted[1]))


def _default_text(comments: list[str]) -> str:
    found = _DEFAULT.search(" ".join(comments))
    return unescape_po(found[1].strip().rstrip('"')) if found else ""
