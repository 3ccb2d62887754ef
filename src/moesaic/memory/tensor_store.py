"""Tensor store: named tensors on a memory tier, lent to where they are computed with.

``lend`` hands out parts of tensors, ``Loan.give_back`` returns what was changed. Where the memory
of the tier is addressable from that place, a loan is a view and nothing is copied; it is counted
as moved all the same where it crosses between device and host, so that the counts of a CPU run are
those beside a GPU. Content starts as zeros, and memory is taken when it is first written.

``freeze`` returns the content at one moment: no later update changes it, so a checkpoint may be
written in the background while steps go on.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from moesaic.core.shapes import Tensor


class Place(Enum):
    """Where lent tensors are computed with: the model's device, or the host's processor."""

    DEVICE = "device"
    HOST = "host"


class Access(Enum):
    """Whether the borrower changes what is lent."""

    READ = "read"
    UPDATE = "update"


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
class MovedBytes:
    """Bytes that a store has lent out of its tier and got back changed, since it was opened."""

    lent: int = 0
    returned: int = 0


@dataclass(frozen=True, slots=True)
class Loan:
    """Lent tensors: ``wait`` returns them, ``give_back`` ends the loan and stores changes.

    As a context manager it does both; after an exception nothing is stored.
    """

    wait: Callable[[], list[Tensor]]
    give_back: Callable[[], None]

    def __enter__(self) -> list[Tensor]:
        return self.wait()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.give_back()


class TensorStore(ABC):
    """Named tensors of one rank on one tier (see the module's docstring)."""

    def __init__(self, device: torch.device, *, label: str) -> None:
        self.device, self.label = device, label
        self.moved = MovedBytes()
        self.specs: dict[str, TensorSpec] = {}

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

    def lend(self, parts: Sequence[Part], *, access: Access, place: Place = Place.DEVICE) -> Loan:
        """Lend parts to ``place``; transfers may be under way until ``Loan.wait``.

        Raises DiskFullError if a disk has no room for what is to be written.
        """
        num_bytes = sum(self.specs[part.name].of(part).num_bytes for part in parts)
        if access is Access.UPDATE:
            self.reserve(parts)
        loan = self._lend(parts, access=access, place=place)
        if not self._moves_to(place):
            return loan
        self.moved.lent += num_bytes

        def give_back() -> None:
            loan.give_back()
            if access is Access.UPDATE:
                self.moved.returned += num_bytes

        return Loan(loan.wait, give_back)

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
        """Wait until everything that was given back is stored."""

    @abstractmethod
    def close(self) -> None:
        """Release the memory of all tensors. Those that were frozen stay valid."""

    @abstractmethod
    def _allocate(self, name: str, spec: TensorSpec) -> None: ...

    @abstractmethod
    def _moves_to(self, place: Place) -> bool:
        """Whether tensors cross between device, host and disk to be used at ``place``."""

    @abstractmethod
    def _lend(self, parts: Sequence[Part], *, access: Access, place: Place) -> Loan: ...


class DeviceStore(TensorStore):
    """Tensors in the memory of the model's device: views there, copies on the host of a GPU."""

    def __init__(self, device: torch.device, *, label: str) -> None:
        super().__init__(device, label=label)
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

    def _moves_to(self, place: Place) -> bool:
        return place is Place.HOST

    def _lend(self, parts: Sequence[Part], *, access: Access, place: Place) -> Loan:
        views = [rows_of(self._tensors[part.name], part) for part in parts]
        if place is Place.DEVICE:
            return Loan(lambda: views, lambda: None)
        return lend_views(views, to=torch.device("cpu"), access=access)


def rows_of(tensor: Tensor, part: Part) -> Tensor:
    """Return a view of the part's rows of its whole tensor."""
    return tensor if not part.start and part.stop is None else tensor[part.start : part.stop]


def lend_views(views: Sequence[Tensor], *, to: torch.device, access: Access) -> Loan:
    """Lend tensors to a device: themselves where they are on it, else copies."""
    lent = [view.to(to) for view in views]

    def give_back() -> None:
        for view, tensor in zip(views, lent, strict=True):
            if tensor is not view:
                view.copy_(tensor)

    return Loan(lambda: lent, give_back if access is Access.UPDATE else lambda: None)
