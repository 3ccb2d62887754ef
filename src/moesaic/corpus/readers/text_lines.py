"""Text files, plain or compressed, read by line; errors name the file and the line.

Lines end in LF or CR LF; only in a file without a single LF does a CR end them (old Mac files).
Other characters at which ``str.splitlines`` splits (U+2028, U+0085, ...) are text.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from moesaic.core.errors import DataError
from moesaic.corpus.readers import limits
from moesaic.corpus.readers.compressed import open_bytes
from moesaic.corpus.readers.encodings import advise_encoding, looks_like_utf16

Row = TypeVar("Row")

_BLOCK = 1 << 16
_SURROGATE = re.compile("[\ud800-\udfff]")


class EmptyFileError(DataError):
    """A file without a row: of many files, one may be empty."""


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line without its end).

    Raises DataError on bytes that are not UTF-8, and on a line of more than ``MAX_LINE_BYTES``.
    """
    with open_bytes(path) as stream:
        for number, raw in enumerate(_raw_lines(stream, path=path), start=1):
            if number == 1 and looks_like_utf16(raw):
                raise _not_utf8(raw, path=path, line=1, at=0, following=stream.read(_BLOCK))
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                following = stream.read(_BLOCK)
                raise _not_utf8(
                    raw, path=path, line=number, at=error.start, following=following
                ) from error
            yield number, (text.removeprefix("\ufeff") if number == 1 else text).rstrip("\r\n")


def _raw_lines(stream: BinaryIO, *, path: Path) -> Iterator[bytes]:
    size = limits.MAX_LINE_BYTES + 1
    first = stream.readline(size)
    if b"\r" in first and b"\n" not in first:  # no LF in the whole file, or not for a long time
        yield from _lines_ending_in_cr(first, stream, path=path)
        return
    number, raw = 1, first
    while raw:
        if len(raw) == size and raw[-1:] != b"\n":
            raise _line_too_long(path, number)
        yield raw
        number, raw = number + 1, stream.readline(size)


def _lines_ending_in_cr(first: bytes, stream: BinaryIO, *, path: Path) -> Iterator[bytes]:
    """Yield lines that end in CR, LF or CR LF."""
    begun = (first[at : at + _BLOCK] for at in range(0, len(first), _BLOCK))
    number, rest, held, block = 1, b"", b"", next(begun)
    while block:
        # a CR at the end of a block may be the first half of CR LF
        held = b"\r" if block.endswith(b"\r") else b""
        *lines, rest = (
            (rest + block.removesuffix(b"\r"))
            .replace(b"\r\n", b"\n")
            .replace(b"\r", b"\n")
            .split(b"\n")
        )
        yield from lines
        number += len(lines)
        if len(rest) > limits.MAX_LINE_BYTES:
            raise _line_too_long(path, number)
        following = next(begun, b"") or stream.read(_BLOCK)
        block = held + following if following else b""
    if rest or held:
        yield rest


def _line_too_long(path: Path, number: int) -> DataError:
    return DataError(
        f"{path}, line {number}: longer than {limits.as_size(limits.MAX_LINE_BYTES)}, the limit of "
        "a line; break it into lines (one text per line), or check that this is a text file"
    )


def read_all_bytes(path: Path) -> bytes:
    """Return all bytes of a file, decompressed. Raises DataError above ``MAX_CATALOGUE_BYTES``."""
    with open_bytes(path) as stream:
        found = bytearray()
        while block := stream.read(_BLOCK):
            found += block
            if len(found) > limits.MAX_CATALOGUE_BYTES:
                raise DataError(
                    f"{path}: more than {limits.as_size(limits.MAX_CATALOGUE_BYTES)}, the limit of "
                    "a catalogue, which is read whole; divide it (msgsplit, or by hand)"
                )
        return bytes(found)


def decode_utf8(raw: bytes, *, path: Path | str) -> str:
    """Decode the UTF-8 of a whole file; a byte-order mark is left out."""
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise _not_utf8(raw, path=path, line=1, at=error.start, following=b"") from error


def _not_utf8(raw: bytes, *, path: Path | str, line: int, at: int, following: bytes) -> DataError:
    found, before = raw[at : at + 4].hex(" "), raw[:at]
    line, column = line + before.count(b"\n"), at - before.rfind(b"\n")
    start = max(0, at - _BLOCK)
    sample = raw[start : at + _BLOCK] + following
    return DataError(
        f"{path}, line {line}: not UTF-8 (bytes {found} at column {column}); "
        f"{advise_encoding(sample, at=at - start)}"
    )


def require_rows(rows: Iterator[Row], *, path: Path, what: str) -> Iterator[Row]:
    """Yield the rows; raise EmptyFileError if there is none."""
    number = 0
    for number, row in enumerate(rows, start=1):  # noqa: B007
        yield row
    if number == 0:
        raise EmptyFileError(f"{path}: empty: it has no {what}")


def replace_lone_surrogates(text: str) -> str:
    r"""Join surrogate pairs (``\ud83d\ude00``) to one character; a lone one becomes U+FFFD.

    A lone surrogate cannot be written as UTF-8; the cleaning rule ``broken`` counts U+FFFD.
    """
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
