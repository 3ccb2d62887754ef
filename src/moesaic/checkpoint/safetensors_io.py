"""Safetensors files: written in one pass without a second copy, checked before they are read.

Format: u64 length of the header, JSON header, raw data (github.com/huggingface/safetensors). A
pickle is rejected by its name and by its first bytes, so no code from a file is executed.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from moesaic.checkpoint.checkpoint_directory import Buffer, Disk
from moesaic.checkpoint.manifest import MANIFEST_FORMAT
from moesaic.core.errors import CheckpointError
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
FORMAT_KEY = "moesaic_format"  # missing in files of format 1, see ``current_name``
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
# a zip archive (torch.save), a tar (older torch.save), or the PROTO opcode of pickle 2 to 5
PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def serialize_tensors(
    tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> Iterator[Buffer]:
    """Yield the bytes of a safetensors file, one tensor at a time.

    Tensors may be on any device and need not be contiguous. They are ordered by item size
    (largest first) and name, so every tensor is aligned and equal tensors give equal files.
    """
    return serialize_lazily(tensors, read=tensors.__getitem__, metadata=metadata)


def serialize_lazily(
    tensors: Mapping[str, Tensor],
    *,
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> Iterator[Buffer]:
    """Like ``serialize_tensors``, for tensors that are read one by one as they are written.

    ``tensors`` give shapes and dtypes (they may be on ``meta``), ``read`` the values.
    """
    names = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))
    header: dict[str, object] = {
        "__metadata__": {"format": "pt", FORMAT_KEY: str(MANIFEST_FORMAT)} | dict(metadata or {})
    }
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in names:
        flat = read(name).detach().cpu().contiguous().flatten()
        if flat.numel():
            yield flat.view(torch.uint8).numpy().data


def write_tensors(
    path: Path,
    *,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    disk: Disk | None = None,
) -> None:
    """Write one safetensors file atomically."""
    disk = disk or Disk()
    part = path.with_name(f".{path.name}.part")
    try:
        disk.make_dir(path.parent)
        disk.write(part, chunks=serialize_tensors(tensors, metadata=metadata))
        disk.rename(part, new=path)
    except OSError as error:
        with suppress(OSError):
            disk.remove(part)
        raise CheckpointError(f"{path}: could not be written: {error.strerror}") from error


def read_tensors(path: Path, *, device: str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file. Raises CheckpointError if it is missing, truncated or a pickle."""
    check_tensor_file(path)
    try:
        with safe_open(path, framework="pt", device=device) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged safetensors file: {error}") from error


def tensor_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def reject_pickle(path: Path) -> None:
    """Raise CheckpointError if a file is a pickle by its name or its first bytes."""
    if path.suffix in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{path}: a {path.suffix} file is a pickle, which can run code when it is read; "
            "expected .safetensors. Convert it where you trust it: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), new_path)"
        )
    with path.open("rb") as stream:
        start = stream.read(9)
    if start.startswith(PICKLE_MAGIC) and start[8:] != b"{":
        raise CheckpointError(
            f"{path}: a pickle with the name of a safetensors file, which can run code when it is "
            "read: rejected. Get the weights as safetensors from their source"
        )


def check_tensor_file(path: Path) -> None:
    """Raise CheckpointError unless it is a complete safetensors file, by name, header and size."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    reject_pickle(path)
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(9)
        if start[8:] != b"{":
            what = "not a safetensors file" if size else "empty file, expected safetensors"
            raise CheckpointError(f"{path}: {what}")
        (length,) = struct.unpack("<Q", start[:8])
        if length > size - 8:
            raise CheckpointError(f"{path}: truncated inside its header ({show_bytes(size)})")
        expected = 8 + length + _data_size(path, b"{" + stream.read(length - 1))
    if expected != size:
        word = "truncated" if size < expected else "longer than its header says"
        raise CheckpointError(f"{path}: {word}: {size} bytes, expected {expected}")


def _data_size(path: Path, header: bytes) -> int:
    try:
        entries = json.loads(header)
        return max(
            (v["data_offsets"][1] for k, v in entries.items() if k != "__metadata__"), default=0
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{path}: damaged safetensors header") from error
