"""Text files, plain or compressed, read line by line with errors that name file and line."""

import gzip
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from moesaic.core.errors import DataError

COMPRESSED = (".gz", ".xz", ".zst")
_DAMAGE = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, zstandard.ZstdError)


def plain_name(path: Path) -> str:
    """Return the name without a compression suffix: ``a.tsv.xz -> a.tsv``."""
    return path.stem if path.suffix in COMPRESSED else path.name


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
        raise DataError(f"{path}: may not be read (permission denied)") from error
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
        return cast(BinaryIO, _ZstdLines(path.open("rb")))
    return path.open("rb")


class _ZstdLines:
    """A zstd stream as lines, which notices a missing end: the library's own reader does not."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw

    def __enter__(self) -> "_ZstdLines":
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    def _blocks(self) -> Iterator[bytes]:
        machine = zstandard.ZstdDecompressor().decompressobj()
        fresh = True
        while block := self._raw.read(1 << 17):
            while block:
                if machine.eof:  # several frames may follow one another
                    machine = zstandard.ZstdDecompressor().decompressobj()
                yield machine.decompress(block)
                fresh = False
                block = machine.unused_data if machine.eof else b""
        if not fresh and not machine.eof:
            raise EOFError("the last frame has no end")

    def read(self, size: int = -1) -> bytes:
        if size >= 0:
            raise NotImplementedError("zstd files are read whole or by line")
        return b"".join(self._blocks())

    def __iter__(self) -> Iterator[bytes]:
        rest = b""
        for block in self._blocks():
            *whole, rest = (rest + block).split(b"\n")
            yield from (line + b"\n" for line in whole)
        if rest:
            yield rest


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line without its end). Raises DataError on bytes that are not UTF-8."""
    with open_bytes(path) as stream:
        for number, raw in enumerate(stream, start=1):
            yield number, decode(raw, path=path, line=number).rstrip("\r\n")


def read_whole(path: Path) -> bytes:
    """Return all bytes of a file, decompressed."""
    with open_bytes(path) as stream:
        return stream.read()


def decode(raw: bytes, *, path: Path | str, line: int) -> str:
    """Decode UTF-8, a byte-order mark left out."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        found = raw[error.start : error.start + 4].hex(" ")
        raise DataError(
            f"{path}, line {line}: not UTF-8 (bytes {found} at column {error.start + 1}); "
            f"convert it first, e.g. iconv -f LATIN1 -t UTF-8"
        ) from error
    return text.removeprefix("\ufeff") if line == 1 else text


@contextmanager
def expect_content(path: Path, *, what: str) -> Iterator[list[None]]:
    """Raise DataError when a reader got to the end and found nothing: append to the list per row."""
    seen: list[None] = []
    yield seen
    if not seen:
        raise DataError(f"{path}: empty: it holds no {what}")
