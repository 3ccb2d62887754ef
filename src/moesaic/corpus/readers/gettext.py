"""Gettext message catalogues, ``.po`` and ``.mo``.

Only translated entries are yielded: fuzzy, obsolete and untranslated ones are left out, and
contexts are dropped, those of KDE 3 (``_: context``) too. A plural entry gives two pairs by the
header's formula: the text for one thing with its form, the plural text with that of most numbers.
"""

import codecs
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from moesaic.core.errors import DataError
from moesaic.corpus.readers.plural_forms import (
    FormulaError,
    PluralForms,
    forms_without_formula,
    parse_plural_forms,
)
from moesaic.corpus.readers.po_syntax import Message, parse_messages
from moesaic.corpus.readers.text_lines import decode_utf8

PLURAL_FORMS = "plural_forms"  # the reason of rejected pairs

_MO_BYTE_ORDERS = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}
_DEFAULT = re.compile(r'Default:\s*"(.*)"\s*', re.DOTALL)
_KEY = re.compile(r"[^\W_]++(?:[_.:-]++[^\W_]++)++")
_CHARSET = re.compile(rb"charset=([\w.:+-]{1,40})", re.IGNORECASE)
_CHARSET_OF_PO = re.compile(rb'"Content-Type:[^\n]{0,200}?charset=([\w.:+-]{1,40})', re.IGNORECASE)
_KDE_CONTEXT = re.compile(r"_:[^\n]*\n")
_KDE_PLURAL = "_n:"
# charsets whose bytes below 128 are ASCII, as gettext requires; by Python's names
_SINGLE_BYTE = re.compile(r"iso8859-\d+|koi8-[rtu]|cp(125\d|437|85[0-8]|86[0-9]|874)|tis-620|ascii")
_MULTI_BYTE = re.compile(
    r"utf-8(-sig)?|big5(hkscs)?|gb2312|gbk|gb18030|euc_(jp|kr)|johab|shift_jis|cp9(32|49|50)"
)


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """A message and its translation.

    ``source`` is the English text also where the message is a key (``#. Default: "..."``).
    """

    source: str
    target: str


@dataclass(frozen=True, slots=True)
class UnknownPlural:
    """A plural entry whose forms nothing tells apart; ``problem`` is a sentence for its user."""

    problem: str


Entry = CatalogueEntry | UnknownPlural


def parse_po(data: bytes, *, name: str) -> Iterator[Entry]:
    """Yield the translated entries of a .po file; ``name`` is for errors.

    Raises DataError with file and line where the text is not PO syntax or not of its charset.
    """
    found = _CHARSET_OF_PO.search(data, 0, 1 << 16)
    declared = found[1].decode("ascii", "replace") if found else ""
    charset = _charset_of_po(data, declared=declared)
    is_utf8 = charset == "utf-8"
    text = decode_utf8(data, path=name) if is_utf8 else _decode(data, charset, name=name)
    messages = parse_messages(text, charset=charset, name=name)
    return _entries(messages, name=name)


def parse_mo(data: bytes, *, name: str) -> Iterator[Entry]:
    """Yield the translated entries of a .mo file; ``name`` is for errors.

    Raises DataError when the bytes are not a compiled catalogue, or are cut short.
    """
    if not data:
        raise DataError(f"{name}: empty, expected a compiled catalogue (.mo)")
    order = _MO_BYTE_ORDERS.get(data[:4])
    if order is None:
        raise DataError(f"{name}: not a compiled catalogue: it starts with {data[:4].hex(' ')}")
    return _entries(_mo_messages(data, order=order, name=name), name=name)


def _charset_of_po(data: bytes, *, declared: str) -> str:
    """Return the charset of a header; UTF-8 where it has none, or where the file is UTF-8 anyway.

    Text of a charset with one byte per character is practically never valid UTF-8.
    """
    charset = _known_charset(declared) or "utf-8"
    if charset != "utf-8" and _SINGLE_BYTE.fullmatch(charset) and not data.isascii():
        try:
            data.decode("utf-8")
        except UnicodeDecodeError:
            return charset
        return "utf-8"
    return charset


def _known_charset(declared: str) -> str:
    """Return Python's name of a charset, or an empty string: unknown, or no extension of ASCII."""
    try:
        name = codecs.lookup(declared).name if declared else ""
    except LookupError:
        return ""
    return name if _SINGLE_BYTE.fullmatch(name) or _MULTI_BYTE.fullmatch(name) else ""


def _decode(data: bytes, charset: str, *, name: str) -> str:
    try:
        return data.decode(charset)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        where = f"{name}, line {line}" if name.endswith(".po") else name
        raise DataError(
            f"{where}: bytes {data[error.start : error.start + 4].hex(' ')} cannot be decoded as "
            f"{charset}, the charset of its header; correct the header or the text"
        ) from error


def _mo_messages(data: bytes, *, order: str, name: str) -> Iterator[Message]:
    try:
        revision, count, sources, targets = struct.unpack_from(f"{order}4I", data, 4)
    except struct.error as error:
        raise DataError(f"{name}: cut short: its header ends too early") from error
    if revision >> 16 > 1:
        raise DataError(f"{name}: revision {revision >> 16} of the format, expected 0 or 1")
    tables = []
    for start in (sources, targets):
        if start + 8 * count > len(data):
            raise DataError(f"{name}: cut short: its tables end too early, at {start + 8 * count}")
        tables.append(memoryview(data)[start : start + 8 * count])
        total = 0
        for size, at in struct.iter_unpack(f"{order}2I", tables[-1]):
            total += size
            if at + size > len(data):
                raise DataError(
                    f"{name}: cut short: {len(data)} bytes, but a text ends beyond them"
                )
        if total > len(data):
            raise DataError(
                f"{name}: damaged: its texts overlap ({total:,} bytes of text in {len(data):,})"
            )
    spans = (struct.iter_unpack(f"{order}2I", table) for table in tables)
    charset = "utf-8"
    for (size, at), (target_size, target_at) in zip(*spans, strict=True):
        source, target = data[at : at + size], data[target_at : target_at + target_size]
        if not source:
            declared = _CHARSET.search(target)
            charset = (declared and _known_charset(declared[1].decode("ascii"))) or "utf-8"
        _, separator, rest = source.rpartition(b"\x04")
        text, *plural = _decode(rest, charset, name=name).split("\0", 1)
        translation = _decode(target, charset, name=name)
        yield Message(
            text,
            tuple(translation.split("\0")) if plural else (translation,),
            plural[0] if plural else None,
            has_context=bool(separator),
        )


def _entries(messages: Iterator[Message], *, name: str) -> Iterator[Entry]:
    """Yield the entries of messages; the header is the first message without a text."""
    held: list[Message] = []
    header: dict[str, str] = {}
    for message in messages:
        held.append(message)
        if not message.source and not message.has_context:
            header = _header(message.targets[0])
            break
    for message in chain(held, messages):
        if message.source and not message.fuzzy:
            yield from _translated(message, header=header, name=name)


def _header(text: str) -> dict[str, str]:
    fields = (line.partition(":") for line in text.split("\n"))
    return {key.strip().casefold(): value.strip() for key, _, value in fields}


def _translated(message: Message, *, header: Mapping[str, str], name: str) -> Iterator[Entry]:
    source = _KDE_CONTEXT.sub("", message.source, count=1) if message.source[:2] == "_:" else ""
    source = source or message.source
    forms, plural = message.targets, message.plural
    if plural is None and source.startswith(_KDE_PLURAL) and "\n" in source:
        source, _, plural = source.removeprefix(_KDE_PLURAL).strip().partition("\n")
        forms = tuple(forms[0].split("\n"))
    if plural is None:
        if forms[0]:
            yield CatalogueEntry(_default_text(message, header=header) or source, forms[0])
        return
    if not any(forms):
        return
    try:
        chosen = _plural_forms(header, count=len(forms))
    except FormulaError as error:
        where = f"{name}, line {message.line}" if message.line else name
        yield UnknownPlural(
            f"{where}: {len(forms)} plural forms, but the header's Plural-Forms {error}; write the "
            "formula of the language there (msginit has it)"
        )
        return
    for text, index in ((source, chosen.singular), (plural, chosen.plural)):
        if text and index < len(forms) and forms[index]:
            yield CatalogueEntry(text, forms[index])


def _plural_forms(header: Mapping[str, str], *, count: int) -> PluralForms:
    """Return the forms by the header's formula, or without one. Raises FormulaError."""
    field, assumed = header.get("plural-forms", ""), forms_without_formula(count)
    try:
        return parse_plural_forms(field)
    except FormulaError as error:
        if assumed is not None:
            return assumed
        problem = f"({field[:80]!r}) cannot be used: {error}" if field else "is missing"
        raise FormulaError(problem) from error


def _default_text(message: Message, *, header: Mapping[str, str]) -> str:
    """Return the text of a ``Default: "..."`` comment, where Plone's tools wrote it.

    Their messages are keys (``label_save``); in other catalogues such a comment is only a comment.
    """
    match = _DEFAULT.fullmatch(" ".join(message.comment.split("\n")))
    if match is None or not (_is_of_plone(header) or _KEY.fullmatch(message.source)):
        return ""
    return match[1]


def _is_of_plone(header: Mapping[str, str]) -> bool:
    """Whether a catalogue has the header that i18ndude writes."""
    named = "domain" in header or "x-domain" in header
    return named and ("preferred-encodings" in header or "language-code" in header)
