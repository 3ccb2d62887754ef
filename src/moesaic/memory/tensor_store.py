"""Tensor store: named tensors on a memory tier, fetched to where they are computed with.

``fetch`` brings parts of tensors there, ``FetchedTensors.release`` writes back what was changed.
Where the tier's memory is addressable from that place, they are views and nothing is copied; they
are counted as moved all the same where they cross between device and host, so that the counts of a
CPU run are those beside a GPU. Content starts as zeros; memory is taken when it is first written.

Two threads may use a store at once, for different tensors.

With a GPU, copies between it and host memory are made on streams of their own
(``device_copies.py``); ``in_flight_bytes`` bounds those of a store in each direction.

``freeze`` returns the content at one moment: no later update changes it, so a checkpoint may be
written in the background while steps go on.
"""

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from moesaic.core.shapes import Tensor
from moesaic.memory.device_copies import device_copies


class Place(Enum):
    """Where fetched tensors are computed with: the model's device, or the host's processor."""

    DEVICE = "device"
    HOST = "host"


class Access(Enum):
    """Whether fetched tensors are changed."""

    READ = "read"
    UPDATE = "update"
    REPLACE = "replace"  # written without having been read


@dataclass(frozen=True, slots=True)
class Part:
    """Rows ``start`` to ``stop`` along the first dim of a stored tensor; by default all of it."""

    name: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def of(self, part: Part) -> "TensorSpec":
        """Return the spec of some rows. Raises ValueError for rows that it does not have."""
        if not part.start and part.stop is None:
            return self
        stop = self.shape[0] if part.stop is None else part.stop
        if not 0 <= part.start <= stop <= self.shape[0]:
            raise ValueError(f"{part}: the tensor has {self.shape[0]} rows")
        return TensorSpec((stop - part.start, *self.shape[1:]), self.dtype)


@dataclass(slots=True)
class TransferCounter:
    """Bytes that have left a store's tier, and bytes written back to it, since it was opened."""

    fetched: int = 0
    written: int = 0


@dataclass(frozen=True, slots=True)
class FetchedTensors:
    """Parts of tensors at the place of use, until ``release``, which writes changes back.

    ``wait`` returns them once they are there.

    As a context manager it does both; after an exception nothing is written.
    """

    wait: Callable[[], list[Tensor]]
    release: Callable[[], None]

    def __enter__(self) -> list[Tensor]:
        return self.wait()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.release()


class TensorStore(ABC):
    """Named tensors of one rank on one tier (see the module's docstring)."""

    def __init__(self, device: torch.device, *, label: str, in_flight_bytes: int) -> None:
        self.device, self.label, self.in_flight_bytes = device, label, in_flight_bytes
        self.copies = device_copies(device, max_bytes=in_flight_bytes)
        self.moved = TransferCounter()
        self.specs: dict[str, TensorSpec] = {}
        self._changed = threading.Condition()  # held by calls, and told of what is released

    def allocate(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Add a tensor of zeros. Raises ValueError for a name that is taken."""
        if name in self.specs:
            raise ValueError(f"{self.label}: {name} is stored already")
        spec = TensorSpec(tuple(shape), dtype)
        self._allocate(name, spec)
        self.specs[name] = spec

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.num_bytes for spec in self.specs.values())

    def fetch(
        self,
        parts: Sequence[Part],
        *,
        access: Access,
        place: Place = Place.DEVICE,
        into: Sequence[Tensor] | None = None,
    ) -> FetchedTensors:
        """Bring parts to ``place``; transfers may be under way until ``FetchedTensors.wait``.

        Where they are copied, the copies are ``into`` these tensors, if given.

        Raises DiskFullError if a disk has no room for what is to be written.
        """
        num_bytes = sum(self.specs[part.name].of(part).num_bytes for part in parts)
        counted = num_bytes * self.moves_to(place)
        with self._changed:
            if access is not Access.READ:
                self.reserve(parts)
            fetched = self._fetch(parts, access=access, place=place, into=into)
            self.moved.fetched += counted * (access is not Access.REPLACE)

        def release() -> None:
            with self._changed:
                fetched.release()
                self.moved.written += counted * (access is not Access.READ)
                self._changed.notify_all()

        return FetchedTensors(fetched.wait, release)

    def write(self, part: Part, source: Tensor) -> None:
        """Store a tensor of the device; its copy may be under way until the part is read."""
        with self._changed:
            self._write(part, source)
            self.moved.written += source.nbytes

    @abstractmethod
    def reserve(self, parts: Sequence[Part]) -> None:
        """Take the room that an update of these parts needs, so that it cannot fail half-way.

        Raises DiskFullError, with all content unchanged.
        """

    @abstractmethod
    def live(self, name: str) -> Tensor:
        """Return a view of the tensor's memory, or of its file, to read or write at once."""

    @abstractmethod
    def freeze(self) -> Mapping[str, Tensor]:
        """Return all tensors as they are now; no later update changes them."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until everything that was released is stored."""

    @abstractmethod
    def close(self) -> None:
        """Release the memory of all tensors. Those that were frozen stay valid."""

    @abstractmethod
    def _allocate(self, name: str, spec: TensorSpec) -> None: ...

    @abstractmethod
    def moves_to(self, place: Place) -> bool:
        """Whether tensors cross between device, host and disk to be used at ``place``."""

    @abstractmethod
    def _fetch(
        self,
        parts: Sequence[Part],
        *,
        access: Access,
        place: Place,
        into: Sequence[Tensor] | None,
    ) -> FetchedTensors: ...

    def _write(self, part: Part, source: Tensor) -> None:
        rows_of(self.live(part.name), part).copy_(source)


class DeviceStore(TensorStore):
    """Tensors in the memory of the model's device: views there, copies on the host of a GPU."""

    def __init__(self, device: torch.device, *, label: str, in_flight_bytes: int) -> None:
        super().__init__(device, label=label, in_flight_bytes=in_flight_bytes)
        self._tensors: dict[str, Tensor] = {}

    def reserve(self, parts: Sequence[Part]) -> None:
        pass

    def live(self, name: str) -> Tensor:
        return self._tensors[name]

    def freeze(self) -> Mapping[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self._tensors.items()}

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        self._tensors, self.specs = {}, {}

    def _allocate(self, name: str, spec: TensorSpec) -> None:
        self._tensors[name] = torch.zeros(spec.shape, dtype=spec.dtype, device=self.device)

    def moves_to(self, place: Place) -> bool:
        return place is Place.HOST

    def _fetch(
        self,
        parts: Sequence[Part],
        *,
        access: Access,
        place: Place,
        into: Sequence[Tensor] | None,
    ) -> FetchedTensors:
        del into  # they are where they are used
        views = [rows_of(self._tensors[part.name], part) for part in parts]
        if place is Place.DEVICE or self.device.type == "cpu":
            return FetchedTensors(lambda: views, lambda: None)
        fetched = [view.cpu() for view in views]

        def release() -> None:
            for view, tensor in zip(views, fetched, strict=True):
                if access is not Access.READ:
                    view.copy_(tensor)

        return FetchedTensors(lambda: fetched, release)


def rows_of(tensor: Tensor, part: Part) -> Tensor:
    """Return a view of the part's rows of its whole tensor."""
    return tensor if not part.start and part.stop is None else tensor[part.start : part.stop]
