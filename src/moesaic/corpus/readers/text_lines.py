"""Text files, plain or compressed, read by line; errors name the file and the line."""

import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import zstandard

from moesaic.core.errors import DataError

Row = TypeVar("Row")

COMPRESSED = (".gz", ".xz", ".zst")
_DAMAGE = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, zstandard.ZstdError)


def name_without_compression(path: Path) -> str:
    """Return the name without a compression suffix: ``a.tsv.xz -> a.tsv``."""
    return path.stem if path.suffix in COMPRESSED else path.name


class EmptyFileError(DataError):
    """A file without a row: of many files, one may be empty."""


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """Open for reading, decompressing by suffix. Raises DataError: missing, damaged, truncated."""
    try:
        with _opened(path) as stream:
            yield stream
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise DataError(f"{path}: is a folder, expected a file") from error
    except PermissionError as error:
        raise DataError(f"{path}: cannot be read (permission denied)") from error
    except _DAMAGE as error:
        raise DataError(
            f"{path}: the archive is damaged or cut short ({error or 'unexpected end'}); "
            "download or compress it again"
        ) from error


def _opened(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    if path.suffix == ".zst":
        return cast(BinaryIO, io.BufferedReader(_ZstdStream(path.open("rb")), 1 << 16))
    return path.open("rb")


class _ZstdStream(io.RawIOBase):
    """A zstd stream that raises EOFError when its last frame is incomplete."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._blocks = self._decompressed()
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = block
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size

    def close(self) -> None:
        self._raw.close()
        super().close()

    def _decompressed(self) -> Iterator[bytes]:
        machine = zstandard.ZstdDecompressor().decompressobj()
        started = False
        while block := self._raw.read(1 << 16):
            while block:
                if machine.eof:  # a file may have several frames
                    machine = zstandard.ZstdDecompressor().decompressobj()
                yield machine.decompress(block)
                started = True
                block = machine.unused_data if machine.eof else b""
        if started and not machine.eof:
            raise EOFError("the last frame is incomplete")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line without its end). Raises DataError on bytes that are not UTF-8."""
    with open_bytes(path) as stream:
        for number, raw in enumerate(stream, start=1):
            yield number, decode_utf8(raw, path=path, line=number).rstrip("\r\n")


def read_all_bytes(path: Path) -> bytes:
    """Return all bytes of a file, decompressed."""
    with open_bytes(path) as stream:
        return stream.read()


def decode_utf8(raw: bytes, *, path: Path | str, line: int = 1) -> str:
    """Decode UTF-8 that begins at a line of a file; a byte-order mark is left out."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        found = raw[error.start : error.start + 4].hex(" ")
        before = raw[: error.start]
        line, column = line + before.count(b"\n"), error.start - before.rfind(b"\n")
        raise DataError(
            f"{path}, line {line}: not UTF-8 (bytes {found} at column {column}); "
            f"convert it first, e.g. iconv -f LATIN1 -t UTF-8"
        ) from error
    return text.removeprefix("\ufeff") if line == 1 else text


def require_rows(rows: Iterator[Row], *, path: Path, what: str) -> Iterator[Row]:
    """Yield the rows; raise EmptyFileError if there is none."""
    number = 0
    for number, row in enumerate(rows, start=1):  # noqa: B007
        yield row
    if number == 0:
        raise EmptyFileError(f"{path}: empty: it has no {what}")
