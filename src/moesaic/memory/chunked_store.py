"""Chunked stores: tensors at fixed offsets of chunks; in host memory here, in files in disk_store.

A chunk has a generation: while a frozen tensor of it is in use, the first update copies the chunk
and goes on in the copy, and the frozen tensors keep the old one.
"""

import math
import mmap
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moesaic.core.shapes import Tensor
from moesaic.memory.named_copies import NamedCopies
from moesaic.memory.tensor_store import (
    Access,
    FetchedTensors,
    Part,
    Place,
    TensorSpec,
    TensorStore,
    rows_of,
)

CHUNK_BYTES = 64 * 2**20  # tensors share a mapping or a file of at least this size
ALIGNMENT = 64  # bytes; of a cache line, and of AVX-512


class Chunk(ABC):
    """Memory or a file that some tensors of a store share."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes, self.used = num_bytes, 0
        self._frozen: weakref.ref[Any] | None = None

    @abstractmethod
    def mapping(self) -> Any:
        """Return the chunk as writable memory: an object with the buffer protocol."""

    @abstractmethod
    def copy(self) -> "Chunk":
        """Return a new chunk of the same content."""

    def frozen_mapping(self) -> Any:
        """Return memory that ``is_frozen`` watches: tensors over it keep it alive."""
        held = self._frozen() if self._frozen is not None else None
        if held is None:
            held = memoryview(self.mapping())
            self._frozen = weakref.ref(held)
        return held

    @property
    def is_frozen(self) -> bool:
        """Whether a frozen tensor of this chunk is in use."""
        return self._frozen is not None and self._frozen() is not None


@dataclass(frozen=True, slots=True)
class Location:
    """Where a tensor is stored: at ``offset`` bytes of chunk number ``chunk``."""

    chunk: int
    offset: int


class ChunkedStore(TensorStore):
    """A store that packs tensors into chunks, one after the other."""

    def __init__(self, device: torch.device, *, label: str, in_flight_bytes: int) -> None:
        super().__init__(device, label=label, in_flight_bytes=in_flight_bytes)
        self._chunks: list[Chunk] = []
        self._locations: dict[str, Location] = {}

    def reserve(self, parts: Sequence[Part]) -> None:
        numbers = sorted({self._locations[part.name].chunk for part in parts})
        frozen = [number for number in numbers if self._chunks[number].is_frozen]
        if frozen:
            self.synchronize()
        for number in frozen:
            self._chunks[number] = self._chunks[number].copy()

    def live(self, name: str) -> Tensor:
        self.synchronize()
        self.reserve([Part(name)])
        return self._tensor(name, self._chunks[self._locations[name].chunk].mapping())

    def freeze(self) -> Mapping[str, Tensor]:
        self.synchronize()
        mappings = [chunk.frozen_mapping() for chunk in self._chunks]
        return {n: self._tensor(n, mappings[at.chunk]) for n, at in self._locations.items()}

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        self.synchronize()
        self.specs, self._chunks, self._locations = {}, [], {}

    def _allocate(self, name: str, spec: TensorSpec) -> None:
        size = -(-spec.num_bytes // ALIGNMENT) * ALIGNMENT
        if not self._chunks or self._chunks[-1].used + size > self._chunks[-1].num_bytes:
            self._chunks.append(self._new_chunk(max(size, CHUNK_BYTES)))
        chunk = self._chunks[-1]
        self._locations[name] = Location(len(self._chunks) - 1, chunk.used)
        chunk.used += size

    def _tensor(self, name: str, mapping: Any) -> Tensor:
        spec, offset = self.specs[name], self._locations[name].offset
        if not spec.num_bytes:
            return torch.empty(spec.shape, dtype=spec.dtype)
        count = math.prod(spec.shape)
        flat = torch.frombuffer(mapping, dtype=spec.dtype, offset=offset, count=count)
        return flat.view(spec.shape)

    @abstractmethod
    def _new_chunk(self, num_bytes: int) -> Chunk: ...


class HostChunk(Chunk):
    """A chunk of host memory: a shared mapping, or pinned memory."""

    def __init__(self, num_bytes: int, *, pinned: bool) -> None:
        super().__init__(num_bytes)
        self._pinned = pinned
        self._memory: Any = (
            torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
            if pinned
            else mmap.mmap(-1, num_bytes)  # anonymous and shared
        )

    def mapping(self) -> Any:
        return self._memory

    def copy(self) -> "HostChunk":
        copied = HostChunk(self.num_bytes, pinned=self._pinned)
        copied.used = self.used
        target, source = copied.mapping(), self.mapping()
        target[: self.used] = source[: self.used]
        return copied


class HostStore(ChunkedStore):
    """Tensors in host memory: views there, copies on a GPU."""

    def __init__(self, device: torch.device, *, label: str, in_flight_bytes: int) -> None:
        super().__init__(device, label=label, in_flight_bytes=in_flight_bytes)
        self._named = None if self.copies is None else NamedCopies(self.copies)

    def synchronize(self) -> None:
        if self._named is not None:
            self._named.synchronize()

    def _new_chunk(self, num_bytes: int) -> Chunk:
        return HostChunk(num_bytes, pinned=self.device.type == "cuda")

    def moves_to(self, place: Place) -> bool:
        return place is Place.DEVICE

    def _fetch(
        self,
        parts: Sequence[Part],
        *,
        access: Access,
        place: Place,
        into: Sequence[Tensor] | None,
    ) -> FetchedTensors:
        named = [(part.name, self._rows(part)) for part in parts]
        if self._named is not None and place is Place.DEVICE:
            return self._named.fetch(named, place=place, access=access, into=into)
        if self._named is not None:
            self._named.synchronize(name for name, _ in named)
        views = [view for _, view in named]
        return FetchedTensors(lambda: views, lambda: None)

    def _write(self, part: Part, source: Tensor) -> None:
        if self._named is None:
            super()._write(part, source)
        else:
            self.reserve([part])
            self._named.write(part.name, self._rows(part), source)

    def _rows(self, part: Part) -> Tensor:
        chunk = self._chunks[self._locations[part.name].chunk]
        return rows_of(self._tensor(part.name, chunk.mapping()), part)
