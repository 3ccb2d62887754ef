"""Distributed checkpoints of torch (DCP): tensors of ``.distcp`` files, read by byte ranges.

``.metadata`` is a pickle. It is read without importing or calling what it names: each class on a
list of names is replaced by a record of its fields, and any other name, opcode or kind of key is an
error. An item of a ``.distcp`` file is opened by ``torch.load(weights_only=True)`` on fake tensors,
which read no data.
"""

import io
import math
import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moesaic.core.errors import CheckpointError, listed, printable
from moesaic.core.file_reader import MIB, FileKind, read_bytes, require_inside
from moesaic.core.shapes import Tensor
from moesaic.exchange.hf_directory import DCP_METADATA, weight_files
from moesaic.exchange.tensor_files import FileTensor, ReadableTensor, TensorFiles, narrowed
from moesaic.exchange.tensor_table import Shape
from moesaic.exchange.torchtitan_names import hugging_face_tensors

METADATA_FILE = FileKind(
    name="metadata of a distributed checkpoint", max_bytes=1024 * MIB, error=CheckpointError
)
NOT_WEIGHTS = ("optimizer", "optim", "lr_scheduler", "dataloader", "train_state", "rng_state")


class _Record:
    """An object of a class that was not imported: what it was made from, and its state."""

    def __init__(self, *made_from: Any) -> None:
        self.made_from = made_from
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Mapping(dict[Any, Any]):
    """A mapping of names or records: the hash of nested tuples may take forever."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__()

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, str | _Record):
            raise TypeError(f"a key is a {type(key).__name__}")
        super().__setitem__(key, value)

    def __setstate__(self, state: Any) -> None:
        raise TypeError("a mapping with a state")


class _TensorRecord(_Record):
    """``TensorStorageMetadata``: ``properties``, ``size``, ``chunks``."""


_STANDS_FOR: Mapping[tuple[str, str], type] = {
    **{
        ("torch.distributed.checkpoint.metadata", name): _Record
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata"),
            *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        )
    },
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"): _TensorRecord,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Record,
    ("torch.serialization", "_get_layout"): _Record,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): _Mapping,
    ("pathlib", "PosixPath"): _Record,
    ("pathlib._local", "PosixPath"): _Record,
}


_OPCODES = (  # that the protocols from 2 on write for such metadata
    *(pickle.PROTO, pickle.FRAME, pickle.MARK, pickle.STOP, pickle.MEMOIZE),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BINFLOAT),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINBYTES, pickle.SHORT_BINBYTES),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD),
)


class _MetadataUnpickler(pickle._Unpickler):  # that of C cannot leave out opcodes
    dispatch: ClassVar = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES} | {
        pickle.EMPTY_DICT[0]: lambda self: self.append(_Mapping())
    }

    def find_class(self, module: str, name: str) -> Any:
        value = vars(torch).get(name) if module == "torch" else None
        found = _STANDS_FOR.get((module, name))
        if found is None and not isinstance(value, torch.dtype):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return found or value


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A block of a tensor at ``offset``: the item of ``length`` bytes of a file at ``start``."""

    offset: Shape
    shape: Shape
    path: Path
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class DCPTensor:
    """A tensor of a distributed checkpoint, in chunks that do not overlap.

    ``open_chunk`` finds the values of a chunk, once for all reads of a checkpoint.
    """

    shape: Shape
    dtype: torch.dtype
    chunks: tuple[StoredChunk, ...]
    open_chunk: Callable[[StoredChunk, torch.dtype], FileTensor]

    def read(self, offset: Shape, shape: Shape) -> Tensor:
        """Return the values of a box. Raises CheckpointError: chunks are missing."""
        values = torch.empty(shape, dtype=self.dtype)
        missing = torch.ones(shape, dtype=torch.bool)
        for chunk in self.chunks:
            pairs = list(zip(offset, chunk.offset, strict=True))
            start = tuple(map(max, pairs))
            ends = zip(offset, shape, chunk.offset, chunk.shape, strict=True)
            sizes = tuple(
                min(o + n, c + m) - s for (o, n, c, m), s in zip(ends, start, strict=True)
            )
            if any(size <= 0 for size in sizes):
                continue
            inside = tuple(s - c for s, (_, c) in zip(start, pairs, strict=True))
            place = tuple(s - o for s, (o, _) in zip(start, pairs, strict=True))
            found = self.open_chunk(chunk, self.dtype).read(inside, sizes)
            narrowed(values, place, sizes, first=0).copy_(found)
            narrowed(missing, place, sizes, first=0).fill_(value=False)
        if missing.any():
            raise CheckpointError(f"{self.chunks[0].path.parent}: chunks of a tensor are missing")
        return values


class DCPFiles(TensorFiles):
    """The tensors of a distributed checkpoint by the names that Hugging Face gives them.

    ``theirs`` is the config of the model. What is no weight is in ``notes``.
    """

    def __init__(self, directory: Path, theirs: Mapping[str, Any]) -> None:
        super().__init__([])
        found, others = read_metadata(directory)
        parts = {name: name.partition(".")[0] for name in found}
        left = {name for name, part in parts.items() if part in NOT_WEIGHTS}
        others = sorted({*others, *(parts[name] for name in left)})
        if others:
            shown = listed(map(printable, others), most=10)
            self.notes = (f"{DCP_METADATA}: no weights, so not read: {shown}",)
        weights: dict[str, ReadableTensor] = {n: t for n, t in found.items() if n not in left}
        for name, tensor in hugging_face_tensors(weights, theirs):
            if name in self.tensors:
                self.repeated.append(name)
            self.tensors[name] = tensor


def open_tensors(directory: Path, theirs: Mapping[str, Any]) -> TensorFiles:
    """Open the weights of a directory with the config ``theirs``. Raises CheckpointError."""
    if (directory / DCP_METADATA).is_file():
        return DCPFiles(directory, theirs)
    return TensorFiles(weight_files(directory))


def read_metadata(directory: Path) -> tuple[dict[str, DCPTensor], list[str]]:
    """Return the tensors of a distributed checkpoint, and the names of what is none.

    Raises CheckpointError: the metadata name anything but classes of such metadata, or are damaged.
    """
    path = directory / DCP_METADATA
    data = read_bytes(path, METADATA_FILE)
    try:
        metadata = _MetadataUnpickler(io.BytesIO(data)).load()
        return _read_tensors(directory, metadata.state)
    except CheckpointError:
        raise
    except (pickle.UnpicklingError, EOFError, AttributeError, LookupError) as error:
        raise _unreadable(path, error) from error
    except (TypeError, ValueError, OverflowError, MemoryError, struct.error) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"{path}: {printable(str(error))}, expected the metadata of torch.distributed.checkpoint "
        "with plain values: nothing of it was run. If you trust it, load the checkpoint with the "
        "program that wrote it and save safetensors"
    )


def _read_tensors(
    directory: Path, state: Mapping[str, Any]
) -> tuple[dict[str, DCPTensor], list[str]]:
    places: dict[tuple[Any, Shape], Mapping[str, Any]] = {
        (_name(index.state["fqn"]), _dims(index.state.get("offset") or ())): info.state
        for index, info in state["storage_data"].items()
    }
    tensors, others, open_chunk = {}, [], cache(_open_chunk)
    for name, entry in state["state_dict_metadata"].items():
        if not isinstance(entry, _TensorRecord):
            others.append(_name(name))
            continue
        chunks = []
        for chunk in entry.state["chunks"]:
            offset, shape = _dims(chunk.state["offsets"]), _dims(chunk.state["sizes"])
            info = places[_name(name), offset]
            if info.get("transform_descriptors"):
                raise CheckpointError(f"{directory}: {printable(name)} is compressed or encrypted")
            path = directory / DCP_METADATA
            file = require_inside(directory, info["relative_path"], kind=METADATA_FILE, where=path)
            start, length = _dims((info["offset"], info["length"]))
            if all(shape):
                chunks.append(StoredChunk(offset, shape, file, start, length))
        size, dtype = _dims(entry.state["size"]), entry.state["properties"].state[0]
        inside = all(
            len(c.shape) == len(size)
            and all(o + n <= s for o, n, s in zip(c.offset, c.shape, size, strict=True))
            for c in chunks
        )
        if not inside or sum(math.prod(c.shape) for c in chunks) != math.prod(size):
            raise ValueError(f"the chunks of {name} are not its values")
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{name} has no dtype")
        tensors[name] = DCPTensor(size, dtype, tuple(chunks), open_chunk)
    return tensors, others


def _name(value: Any) -> str:
    """Return a text. Raises TypeError for anything else."""
    if not isinstance(value, str):
        raise TypeError("a name that is no text")
    return value


def _dims(values: Any) -> Shape:
    """Return whole numbers of at least zero. Raises ValueError for others."""
    if not all(type(value) is int and 0 <= value < 2**62 for value in values):
        raise ValueError("it has a size that is no whole number")
    return tuple(values)


def _open_chunk(chunk: StoredChunk, dtype: torch.dtype) -> FileTensor:
    """Find the values of a chunk in its file. Raises CheckpointError: not what is expected."""
    try:
        with chunk.path.open("rb") as stream, FakeTensorMode():
            part = io.BufferedReader(_Part(stream, chunk.start, chunk.length))
            item = torch.load(part, weights_only=True)
    except Exception as error:  # torch.load of damaged bytes fails in any way
        raise CheckpointError(f"{chunk.path}: no tensor at byte {chunk.start} ({error})") from error
    if not isinstance(item, Tensor) or not item.is_contiguous() or item.dtype != dtype:
        raise CheckpointError(f"{chunk.path}: at byte {chunk.start} no plain tensor of {dtype}")
    if tuple(item.shape) != chunk.shape:
        raise CheckpointError(f"{chunk.path}: at byte {chunk.start} a tensor of another shape")
    # set for fake tensors: where the values are in the item; not in files of torch before 1.6
    place = cast(int | None, item.untyped_storage()._checkpoint_offset)
    if place is None:
        raise CheckpointError(f"{chunk.path}: at byte {chunk.start} no tensor in a zip file")
    first = chunk.start + place + int(item.storage_offset()) * dtype.itemsize
    return FileTensor(chunk.path, chunk.shape, dtype, first)


class _Part(io.RawIOBase):
    """A range of bytes of a file as a file."""

    def __init__(self, stream: BinaryIO, start: int, length: int) -> None:
        super().__init__()
        self._stream, self._start, self._length, self._at = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        self._stream.seek(self._start + self._at)
        size = max(0, min(len(buffer), self._length - self._at))
        found = self._stream.read(size)
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)
