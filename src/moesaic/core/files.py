"""Atomic file writes, JSON files, file hashes; operating-system errors as sentences."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moesaic.core.errors import FileError, UserError, printable
from moesaic.core.os_errors import os_error_reason


@contextmanager
def os_errors_named(
    path: Path, *, action: str, kind: type[UserError] = FileError
) -> Iterator[None]:
    """Raise OSErrors of the block as a ``kind`` that names ``path``, e.g. "cannot be written"."""
    try:
        yield
    except OSError as error:
        why = os_error_reason(error)
        raise kind(f"{printable(str(path), limit=200)}: {action}: {why}") from error
    except ValueError as error:  # a NUL in the path, or a surrogate that is no byte of a name
        if not isinstance(error, UnicodeEncodeError) and "null" not in str(error):
            raise
        raise kind(f"{printable(str(path))}: {action}: not a file name ({error})") from error


def make_dir(path: Path) -> None:
    """Create a directory and its parents. Raises FileError, also for a name that is no UTF-8."""
    with os_errors_named(path, action="cannot be created"):
        str(path).encode()  # safetensors opens no other name, at the end of training
        path.mkdir(parents=True, exist_ok=True)


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write ``content`` atomically: a reader sees the old file or the new one, never a part.

    Raises FileError that names the file; then nothing of the new one is left. Surrogates, which
    UTF-8 cannot hold, become U+FFFD.
    """
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    if isinstance(content, str) and b"\xed" in data:
        data = data.decode("utf-8", "replace").encode()
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with os_errors_named(path, action="cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(path)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Make a directory that gets the name ``out`` at the end, if nothing fails.

    Raises FileError if ``out`` exists or cannot be made.
    """
    if out.exists():
        raise FileError(f"{out}: exists already, expected a new directory")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    make_dir(part)
    try:
        yield part
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


@contextmanager
def removed_on_error(directory: Path) -> Iterator[None]:
    """Remove a directory, which is whole, if the block fails or is stopped (Ctrl-C)."""
    try:
        yield
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def copy_files(paths: Iterable[Path], *, to: Path) -> None:
    """Copy those of ``paths`` that are files into a directory, which is made if there is none."""
    to.mkdir(parents=True, exist_ok=True)
    for path in paths:
        if path.is_file():
            shutil.copyfile(path, to / path.name)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. Raises FileError."""
    atomic_write(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def sha256(path: Path) -> str:
    """Return the SHA-256 hex digest of a file. Raises FileError."""
    with os_errors_named(path, action="cannot be read"), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
