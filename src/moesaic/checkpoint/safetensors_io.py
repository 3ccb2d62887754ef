"""Safetensors files: written in one pass without a second copy, checked before they are read.

Format: u64 length of the header, JSON header, raw data (github.com/huggingface/safetensors). A
pickle is rejected by its name and by its first bytes, so no code from a file is executed.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moesaic.checkpoint.checkpoint_directory import Buffer, Disk
from moesaic.checkpoint.manifest import MANIFEST_FORMAT
from moesaic.core.config_errors import show_value
from moesaic.core.errors import CheckpointError
from moesaic.core.file_reader import MAX_INT, MIB, FileKind, open_file, parse_json
from moesaic.core.files import os_errors_named
from moesaic.core.os_errors import os_error_reason
from moesaic.core.shapes import Tensor
from moesaic.core.units import show_bytes

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TENSOR_FILE = FileKind(
    name="safetensors header",
    max_bytes=MAX_INT,
    max_values=20_000_000,
    error=CheckpointError,
)
MAX_HEADER_BYTES = 100 * MIB - 8  # as the safetensors library
MAX_DIMS = 16
FORMAT_KEY = "moesaic_format"  # missing in files of format 1
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
# a zip archive (torch.save), a tar (older torch.save), or the PROTO opcode of pickle 2 to 5
PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def serialize_tensors(
    tensors: Mapping[str, Tensor],
    *,
    read: Callable[[str], Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Iterator[Buffer]:
    """Yield the bytes of a safetensors file, one tensor at a time.

    Tensors may be on any device and need not be contiguous. They are ordered by item size
    (largest first) and name, so every tensor is aligned and equal tensors give equal files. With
    ``read``, which returns the values of a tensor as it is written, ``tensors`` give shapes and
    dtypes alone (they may be on ``meta``).
    """
    one = read or tensors.__getitem__
    return serialize_chunks(tensors, read=lambda name: (one(name),), metadata=metadata)


def serialize_chunks(
    tensors: Mapping[str, Tensor],
    *,
    read: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> Iterator[Buffer]:
    """Like ``serialize_tensors``, for tensors whose values are read some at a time, in order."""
    layout = TensorFileLayout.of(tensors, metadata=metadata)
    yield layout.header
    for name in layout.starts:
        if tensors[name].numel():
            yield from map(tensor_bytes, read(name))


def tensor_bytes(tensor: Tensor) -> Buffer:
    """Return the bytes of a tensor on any device, in row-major order."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


@dataclass(frozen=True, slots=True)
class TensorFileLayout:
    """The bytes of a file before its data, where each tensor ``starts`` in it, and its ``size``."""

    header: bytes
    starts: Mapping[str, int]
    size: int

    @staticmethod
    def of(
        tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None
    ) -> "TensorFileLayout":
        """Return the layout of ``tensors``, which may be on ``meta``, in the order of the data."""
        header: dict[str, object] = {
            "__metadata__": {"format": "pt", FORMAT_KEY: str(MANIFEST_FORMAT)}
            | dict(metadata or {})
        }
        starts, end = {}, 0
        for name in sorted(tensors, key=lambda n: (-tensors[n].element_size(), n)):
            tensor = tensors[name]
            starts[name], end = end, end + tensor.numel() * tensor.element_size()
            header[name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [starts[name], end],
            }
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        text = struct.pack("<Q", len(text)) + text
        return TensorFileLayout(
            text, {name: len(text) + start for name, start in starts.items()}, len(text) + end
        )


def write_tensors(
    path: Path,
    *,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    read: Callable[[str], Tensor] | None = None,
    disk: Disk | None = None,
) -> None:
    """Write one safetensors file atomically; with ``read`` as ``serialize_tensors`` does."""
    disk = disk or Disk()
    part = path.with_name(f".{path.name}.part")
    try:
        disk.make_dir(path.parent)
        disk.write(part, chunks=serialize_tensors(tensors, read=read, metadata=metadata))
        disk.rename(part, new=path)
    except OSError as error:
        with suppress(OSError):
            disk.remove(part)
        why = os_error_reason(error)
        raise CheckpointError(f"{path}: could not be written: {why}") from error


def read_tensors(path: Path, *, device: str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file. Raises CheckpointError if it is missing, truncated or a pickle."""
    check_tensor_file(path)
    try:
        with safe_open(path, framework="pt", device=device) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged safetensors file: {error}") from error


def reject_pickle(path: Path) -> None:
    """Raise CheckpointError if a file is a pickle by its name or its first bytes."""
    if path.suffix in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{path}: a {path.suffix} file is a pickle, which can run code when it is read; "
            "expected .safetensors. Convert it where you trust it: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), new_path)"
        )
    with open_file(path, TENSOR_FILE) as stream:
        start = stream.read(9)
    if start.startswith(PICKLE_MAGIC) and start[8:] != b"{":
        raise CheckpointError(
            f"{path}: a pickle with the name of a safetensors file, which can run code when it is "
            "read: rejected. Get the weights as safetensors from their source"
        )


def check_tensor_file(path: Path) -> None:
    """Raise CheckpointError unless it is a complete safetensors file, by name, header and size."""
    read_header(path)


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """A tensor in the header of a safetensors file: ``start`` to ``end`` of the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """The checked header of a safetensors file."""

    metadata: dict[str, str]
    tensors: dict[str, HeaderEntry]

    @property
    def file_format(self) -> int:
        """The format that decides the names of parameters, see ``current_name``."""
        text = self.metadata.get(FORMAT_KEY, "1")
        return int(text) if text.isdecimal() else MANIFEST_FORMAT

    @property
    def numel(self) -> int:
        """Values of all tensors."""
        return sum(entry.numel for entry in self.tensors.values())


def read_header(path: Path) -> TensorHeader:
    """Read the header of a safetensors file; nothing is allocated for its tensors.

    Every kind, shape and offset is checked, and the size of the file. Raises CheckpointError: no
    such file, a pickle, truncated, damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    with os_errors_named(path, action="cannot be opened", kind=CheckpointError):
        str(path).encode()  # the safetensors library takes UTF-8 only
    reject_pickle(path)
    with open_file(path, TENSOR_FILE) as stream:
        size = os.fstat(stream.fileno()).st_size
        start = stream.read(9)
        if start[8:] != b"{":
            what = "not a safetensors file" if size else "empty file, expected safetensors"
            raise CheckpointError(f"{path}: {what}")
        (length,) = struct.unpack("<Q", start[:8])
        if length > size - 8:
            raise CheckpointError(f"{path}: truncated inside its header ({show_bytes(size)})")
        if length > MAX_HEADER_BYTES:
            most = show_bytes(MAX_HEADER_BYTES)
            raise CheckpointError(
                f"{path}: header of {show_bytes(length)}, expected at most {most}"
            )
        text = b"{" + stream.read(length - 1)
    header = _parse_header(path, text)
    expected = 8 + length + max((entry.end for entry in header.tensors.values()), default=0)
    if expected != size:
        word = "truncated" if size < expected else "longer than its header says"
        raise CheckpointError(f"{path}: {word}: {size} bytes, expected {expected}")
    return header


def _parse_header(path: Path, text: bytes) -> TensorHeader:
    entries = parse_json(text, kind=TENSOR_FILE, where=path)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise TENSOR_FILE.problem(path, "its metadata are not texts by name")
    tensors = {name: _parse_entry(path, name, entry) for name, entry in entries.items()}
    end = 0
    for entry in sorted(tensors.values(), key=lambda e: (e.start, e.end)):
        if entry.start != end:
            found = f"found data from byte {entry.start}, expected it from {end}"
            raise TENSOR_FILE.problem(path, f"tensors that overlap or leave gaps: {found}")
        end = entry.end
    return TensorHeader(metadata, tensors)


def _parse_entry(path: Path, name: str, value: Any) -> HeaderEntry:
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]}:
            numbers = [*shape, start, end]
        case _:
            raise TENSOR_FILE.problem(path, f"{show_value(name)}: found {show_value(value)}")
    if any(type(n) is not int or n < 0 for n in numbers) or len(shape) > MAX_DIMS:
        found = f"shape {show_value(shape)} at {show_value([start, end])}"
        raise TENSOR_FILE.problem(path, f"{show_value(name)}: found {found}, expected sizes")
    known = {text: kind.itemsize for kind, text in DTYPE_NAMES.items()}
    if dtype not in known:
        expected = f"expected one of {', '.join(known)}"
        raise TENSOR_FILE.problem(path, f"{show_value(name)}: {show_value(dtype)}, {expected}")
    if math.prod(shape) * known[dtype] != end - start:
        found = f"{end - start} bytes for {dtype} {show_value(shape)}"
        raise TENSOR_FILE.problem(path, f"{show_value(name)}: found {found}")
    return HeaderEntry(dtype, tuple(shape), start, end)
