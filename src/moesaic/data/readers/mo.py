"""MO: compiled gettext catalogues, read by their published layout (GNU gettext manual, 10.3)."""

import re
import struct
from collections.abc import Iterator

from moesaic.core.errors import DataError
from moesaic.data.readers.entry import CatalogueEntry

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
