"""Files opened for reading, decompressed by suffix (.gz, .bz2, .xz, .zst), with bounded memory.

At most a piece of fixed size is decompressed at a time. A file that expands beyond
``MAX_EXPANSION`` is refused: a few kilobytes can hold terabytes of one repeated character.
"""

import bz2
import gzip
import io
import lzma
import math
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from moesaic.core.errors import DataError
from moesaic.corpus.readers import limits

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_DAMAGE = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, zstandard.ZstdError)
_BLOCK = 1 << 16
_ZSTD_BLOCK = 1 << 8  # a block of 128 KiB may take 4 bytes: at most 8 MiB at a time
_PIECE = 1 << 20


def name_without_compression(path: Path) -> str:
    """Return the name without a compression suffix: ``a.tsv.xz -> a.tsv``."""
    return path.stem if path.suffix.casefold() in COMPRESSED else path.name


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """Open for reading, decompressing by suffix.

    Raises DataError: missing, unreadable, damaged, truncated, or above ``MAX_EXPANSION``.
    """
    try:
        with path.open("rb") as raw, _decompressed(path, raw) as stream:
            yield stream
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise DataError(f"{path}: is a folder, expected a file") from error
    except PermissionError as error:
        raise DataError(f"{path}: cannot be read (permission denied)") from error
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if error.errno is None and path.suffix.casefold() == ".bz2":  # bz2 has no error of its own
            raise _damaged(path, error) from error
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        if "null byte" in str(error):
            raise DataError(f"{path!r}: a file name cannot hold a NUL character") from error
        raise


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path}: the archive is damaged or cut short ({error or 'unexpected end'}); "
        "download or compress it again"
    )


def _decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    suffix = path.suffix.casefold()
    if suffix not in COMPRESSED:
        return raw
    if suffix == ".gz":
        inner: io.RawIOBase = cast(io.RawIOBase, gzip.GzipFile(fileobj=raw))
    else:
        inner = _PieceStream(_PIECES[suffix](raw))
    return io.BufferedReader(_ExpansionCheck(inner, raw=raw, path=path), _BLOCK)


class _ExpansionCheck(io.RawIOBase):
    """A decompressed stream that refuses to grow far beyond the file that it is read from."""

    def __init__(self, stream: io.RawIOBase, *, raw: BinaryIO, path: Path) -> None:
        self._stream, self._path, self._produced = stream, path, 0
        status = os.fstat(raw.fileno())  # a pipe has no size: it is read without this limit
        self._size = status.st_size if stat.S_ISREG(status.st_mode) else math.inf

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer) or 0
        self._produced += count
        allowed = max(limits.FREE_EXPANSION_BYTES, limits.MAX_EXPANSION * self._size)
        if self._produced > allowed:
            raise DataError(
                f"{self._path}: expands to more than {limits.MAX_EXPANSION} times its "
                f"{self._size:,} bytes, the limit for compressed files; if its text really is that "
                "repetitive, decompress it first and give the plain file"
            )
        return count


class _PieceStream(io.RawIOBase):
    """A stream over an iterator of decompressed pieces."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def _zstd_pieces(raw: BinaryIO) -> Iterator[bytes]:
    """Yield what the frames of a zstd file hold. Raises EOFError when the last is incomplete."""
    machine, started = zstandard.ZstdDecompressor().decompressobj(), False
    while block := raw.read(_ZSTD_BLOCK):
        while block:
            if machine.eof:  # a file may have several frames
                machine = zstandard.ZstdDecompressor().decompressobj()
            yield machine.decompress(block)
            started = True
            block = machine.unused_data if machine.eof else b""
    if started and not machine.eof:
        raise EOFError("the last frame is incomplete")


def _xz_pieces(raw: BinaryIO) -> Iterator[bytes]:
    """Yield what the streams of an xz file hold, with a limit on the dictionary's memory."""
    return _stream_pieces(raw, lambda: lzma.LZMADecompressor(memlimit=limits.MAX_DICTIONARY_BYTES))


def _bz2_pieces(raw: BinaryIO) -> Iterator[bytes]:
    """Yield what the streams of a bzip2 file hold.

    ``bz2.BZ2File`` takes a damaged second stream for the end of the file.
    """
    return _stream_pieces(raw, bz2.BZ2Decompressor)


def _stream_pieces(
    raw: BinaryIO, fresh: Callable[[], lzma.LZMADecompressor | bz2.BZ2Decompressor]
) -> Iterator[bytes]:
    """Yield what the streams of a file hold. Raises EOFError when the last is incomplete."""
    machine, block, started = fresh(), raw.read(_BLOCK), False
    while block:
        started = True
        yield machine.decompress(block, _PIECE)
        while not machine.eof and not machine.needs_input:
            yield machine.decompress(b"", _PIECE)
        block = machine.unused_data if machine.eof else b""
        block = block or raw.read(_BLOCK)
        if machine.eof:
            block = _without_padding(block, raw)
            machine = fresh() if block else machine
    if started and not machine.eof:
        raise EOFError("the last stream is incomplete")


def _without_padding(block: bytes, raw: BinaryIO) -> bytes:
    """Return what follows the padding (NUL bytes) between two streams."""
    while block and not (block := block.lstrip(b"\0")):
        block = raw.read(_BLOCK)
    return block


_PIECES = {".bz2": _bz2_pieces, ".xz": _xz_pieces, ".zst": _zstd_pieces}
