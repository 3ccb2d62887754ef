"""The one place where files of our own formats are read: limits first, then kinds, then use.

A ``FileKind`` declares what a file may be: size, number of values, length of a line, and the error
class of its owner. A ``FileShape`` declares the fields of a JSON file with kinds and ranges; a
field that is not declared is not read. Whatever a file contains, reading it ends with a value that
fits or with a UserError that names the file, the place, what was found and what was expected, in
linear time and bounded memory. Depth is limited to 200 by pydantic's JSON parser, digits of whole
numbers to 4,300; whole numbers outside of 64 bits are rejected here.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, BinaryIO, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from moesaic.core.config_errors import describe_errors, show_value
from moesaic.core.errors import FileError, UserError, printable
from moesaic.core.os_errors import os_error_reason
from moesaic.core.units import show_bytes

MAX_INT = 2**63 - 1  # whole numbers are 64 bits: of files, of configs and of tensors
MAX_NAME_LENGTH = 255
KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FileKind:
    """A kind of file: its name in messages and its limits, checked before anything is parsed.

    ``max_values`` limits commas and opening brackets, and thereby lists, keys and memory.
    ``max_line`` limits a line in bytes, of files that are read line by line. ``error`` is the class
    of the errors, ``way_out`` the end of their sentences.
    """

    name: str
    max_bytes: int
    max_values: int = 1_000_000
    max_line: int = MIB
    error: type[UserError] = FileError
    way_out: str = ""

    def problem(self, path: Path | str, message: str) -> UserError:
        """Return the error about a file of this kind."""
        end = f"; {self.way_out}" if self.way_out else ""
        return self.error(f"{printable(str(path), limit=300)}: {message}{end}")


Count = Annotated[int, Field(ge=0, le=MAX_INT)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # hexadecimal
_S = TypeVar("_S", bound="FileShape")


class FileShape(BaseModel):
    """Base class of the declared fields of a JSON file: exact kinds, unknown keys are ignored."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="ignore", protected_namespaces=(), allow_inf_nan=False
    )
    kind: ClassVar[FileKind]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and check a file of this shape. Raises the error of ``kind``."""
        return parse_shape(read_bytes(path, cls.kind), cls, kind=cls.kind, where=path)


class FileEntry(FileShape):
    """A file in a manifest: its size and its hash."""

    bytes: Count
    sha256: Sha256


def open_file(path: Path, kind: FileKind) -> BinaryIO:
    """Open a regular file within its limit of size; a device or a pipe is rejected unread."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise kind.problem(path, _why(error)) from error
    status = os.fstat(descriptor)
    problem = ""
    if not stat.S_ISREG(status.st_mode):
        problem = f"not a regular file, expected a {kind.name}"
    elif status.st_size > kind.max_bytes:
        found, most = show_bytes(status.st_size), show_bytes(kind.max_bytes)
        problem = f"{found}, expected a {kind.name} of at most {most}"
    if problem:
        os.close(descriptor)
        raise kind.problem(path, problem)
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, kind: FileKind) -> bytes:
    """Return the content of a file. Raises the error of ``kind``, also if it grows past a limit."""
    with open_file(path, kind) as stream:
        try:
            data = stream.read(kind.max_bytes + 1)
        except OSError as error:
            raise kind.problem(path, _why(error)) from error
    if len(data) > kind.max_bytes:
        raise kind.problem(path, f"expected a {kind.name} of at most {show_bytes(kind.max_bytes)}")
    return data


def read_text(path: Path, kind: FileKind) -> str:
    """Return a UTF-8 file (a byte order mark is skipped). Raises the error of ``kind``."""
    return decode_text(read_bytes(path, kind), kind=kind, where=path)


def decode_text(data: bytes, *, kind: FileKind, where: Path | str) -> str:
    """Return ``data`` as text. Raises the error of ``kind`` with line and byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"line {line}: byte 0x{data[error.start]:02x}, expected UTF-8 text"
        raise kind.problem(where, found) from error


def read_json(path: Path, kind: FileKind) -> Any:
    """Return the value of a JSON file without a declared shape."""
    return parse_json(read_bytes(path, kind), kind=kind, where=path)


def read_json_mapping(path: Path, kind: FileKind) -> dict[str, Any]:
    """Return the value of a JSON file that is a mapping of names to values."""
    value = read_json(path, kind)
    if not isinstance(value, dict):
        raise kind.problem(path, f"found {show_value(value)}, expected a mapping")
    return value


def parse_json(data: bytes, *, kind: FileKind, where: Path | str) -> Any:
    """Return the value of JSON bytes. Raises the error of ``kind``."""
    _check_values(data, kind=kind, where=where)
    try:
        value = from_json(data.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError) as error:
        raise kind.problem(where, f"not a {kind.name}: {error}") from error
    _check_integers(value, kind=kind, where=where)
    return value


def parse_shape(data: bytes, cls: type[_S], *, kind: FileKind, where: Path | str) -> _S:
    """Return JSON bytes as a ``cls``. Raises the error of ``kind`` that names each wrong field."""
    _check_values(data, kind=kind, where=where)
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return cls.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "json_invalid":
            raise kind.problem(where, f"not a {kind.name}: {first['msg']}") from error
        problems = describe_errors(cls, error, given=from_json(data))
        more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
        raise kind.problem(where, "; ".join(problems[:4]) + more) from error


def iter_lines(path: Path, kind: FileKind) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, line) of a file; a line over ``max_line`` is an error of ``kind``."""
    offset = 0
    with open_file(path, kind) as stream:
        while line := stream.readline(kind.max_line + 1):
            if len(line) > kind.max_line:
                most = show_bytes(kind.max_line)
                raise kind.problem(path, f"a line at byte {offset} is longer than {most}")
            yield offset, line
            offset += len(line)


def require_inside(folder: Path, name: object, *, kind: FileKind, where: Path) -> Path:
    """Return ``folder / name`` for a name in the file ``where``, or raise the error of ``kind``.

    The name must be relative, without ``..``, and no link on the way may lead out of the folder.
    """
    if not isinstance(name, str) or not name or not name.isprintable():
        raise kind.problem(where, f"found {show_value(name)}, expected the name of a file")
    parts = PurePosixPath(name).parts
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive
    if absolute or ".." in parts or "\\" in name or any(len(p) > MAX_NAME_LENGTH for p in parts):
        expected = f"expected a name inside of {folder}"
        raise kind.problem(where, f"found {show_value(name)}, {expected}")
    require_no_link_out(folder, name, kind=kind)
    return folder / name


def require_no_link_out(folder: Path, name: str, *, kind: FileKind) -> None:
    """Raise the error of ``kind`` if ``folder / name`` leads out of ``folder`` by a link."""
    try:
        resolved, root = (folder / name).resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise kind.problem(folder / name, "its links cannot be followed") from error
    if not resolved.is_relative_to(root):
        found = f"a link that leads out of {folder}, to {printable(str(resolved))}"
        raise kind.problem(folder / name, f"{found}; replace it by the file itself (cp -L)")


def _check_values(data: bytes, *, kind: FileKind, where: Path | str) -> None:
    count = data.count(b",") + data.count(b"[") + data.count(b"{")
    if count > kind.max_values:
        most = f"expected at most {kind.max_values:,} in a {kind.name}"
        raise kind.problem(where, f"about {count:,} values, {most}")


def _check_integers(value: Any, *, kind: FileKind, where: Path | str) -> None:
    """Raise for whole numbers outside of 64 bits, which no later arithmetic expects."""
    waiting = [value]
    while waiting:
        match waiting.pop():
            case bool() | float() | str() | None:
                continue
            case int() as number if abs(number) > MAX_INT:
                found = f"found {show_value(number)}, expected a number of 64 bits"
                raise kind.problem(where, found)
            case dict() as mapping:
                waiting += mapping.values()
            case list() as items:
                waiting += items


def _why(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return os_error_reason(error)
    return f"not a file name ({error})"
