"""Atomic file writes, JSON files, file hashes; operating-system errors as sentences."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moesaic.core.errors import FileError, UserError, printable

# errno -> (what was found, the way out)
_OS_ERRORS = {
    errno.ENOSPC: ("the disk is full", "free some space, or use another directory"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or use another directory"),
    errno.EROFS: ("the file system is read-only", "use another directory"),
    errno.EACCES: ("no permission", "change the permissions, or use another path"),
    errno.EPERM: ("not permitted", "change the permissions, or use another path"),
    errno.ENAMETOOLONG: ("the name or path is too long", "use a shorter one"),
    errno.ENOTDIR: ("a part of the path is a file, expected directories", "use another path"),
    errno.EEXIST: ("a part of the path is a file, expected directories", "use another path"),
    errno.EISDIR: ("a directory is there, expected a file", "use another path, or move it"),
    errno.ENOENT: ("no such file or directory", "check the path"),
    errno.ELOOP: ("its links lead in a circle", "replace the link by a file"),
    errno.EMFILE: ("too many open files", "raise the limit (ulimit -n)"),
    errno.EFBIG: ("the file is too large for this file system", "use another directory"),
    errno.EIO: ("the device reports an input/output error", "check the disk"),
    errno.ESTALE: ("the network file system lost the file", "try again"),
}


def describe_os_error(error: OSError, path: Path | None = None) -> str:
    """Return an operating-system error as one sentence: file, what was found, the way out.

    ``path`` is used if the error names no file.
    """
    name = path if path is not None else error.filename
    where = f"{printable(os.fsdecode(name), limit=200)}: " if isinstance(name, str | Path) else ""
    if error.errno not in _OS_ERRORS:
        return f"{where}{error.strerror or printable(str(error))}"
    found, way_out = _OS_ERRORS[error.errno]
    return f"{where}{found}; {way_out}"


@contextmanager
def os_errors_named(
    path: Path, *, action: str, kind: type[UserError] = FileError
) -> Iterator[None]:
    """Raise OSErrors of the block as a ``kind`` that names ``path``, e.g. "cannot be written"."""
    try:
        yield
    except OSError as error:
        sentence = describe_os_error(error, path).removeprefix(f"{path}: ")
        raise kind(f"{printable(str(path), limit=200)}: {action}: {sentence}") from error
    except ValueError as error:  # a NUL in the path, or a surrogate that is no byte of a name
        if not isinstance(error, UnicodeEncodeError) and "null" not in str(error):
            raise
        raise kind(f"{printable(str(path))}: {action}: not a file name ({error})") from error


def make_dir(path: Path) -> None:
    """Create a directory and its parents. Raises FileError."""
    with os_errors_named(path, action="cannot be created"):
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


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. Raises FileError."""
    atomic_write(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def sha256(path: Path) -> str:
    """Return the SHA-256 hex digest of a file. Raises FileError."""
    with os_errors_named(path, action="cannot be read"), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
