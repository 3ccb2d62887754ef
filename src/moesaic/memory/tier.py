"""Memory tier: device, host or disk memory, where the tensors of one purpose are between uses.

A tier is a value of the config; ``open`` makes the store that holds the tensors of one rank. On a
CPU run the device tier is the process's anonymous memory, and the host tier a shared mapping, which
neither ``RssAnon`` nor ``RLIMIT_DATA`` counts.
"""

import tempfile
from abc import abstractmethod
from pathlib import Path

import torch

from moesaic.core.config import Choice
from moesaic.memory.chunked_store import HostStore
from moesaic.memory.disk_store import DiskStore
from moesaic.memory.tensor_store import DeviceStore, TensorStore

MAX_IN_FLIGHT_BYTES = 256 * 2**20


class Tier(Choice):
    """Family of memory tiers: where tensors are while nothing computes with them."""

    @property
    def is_device(self) -> bool:
        """Whether tensors stay in the memory of the device that computes the model."""
        return False

    @abstractmethod
    def open(
        self, *, device: torch.device, label: str, in_flight_bytes: int = MAX_IN_FLIGHT_BYTES
    ) -> TensorStore:
        """Return an empty store of this tier that lends tensors to ``device``.

        ``label`` names it in messages and files (``rank0-optimizer-states``). ``in_flight_bytes``
        bounds the copies that are under way or in use.
        """


class DeviceMemory(Tier):
    """The memory of the device that computes: nothing moves."""

    @property
    def is_device(self) -> bool:
        return True

    def open(
        self,
        *,
        device: torch.device,
        label: str,
        in_flight_bytes: int = MAX_IN_FLIGHT_BYTES,
    ) -> TensorStore:
        return DeviceStore(device, label=label, in_flight_bytes=in_flight_bytes)


class HostMemory(Tier):
    """Host memory: pinned beside a GPU, else a shared mapping."""

    def open(
        self,
        *,
        device: torch.device,
        label: str,
        in_flight_bytes: int = MAX_IN_FLIGHT_BYTES,
    ) -> TensorStore:
        return HostStore(device, label=label, in_flight_bytes=in_flight_bytes)


class DiskStorage(Tier):
    """Files in ``folder``, which should be on a local disk; None is the one for temporary files.

    Files have no directory entry while they are used, so a run that ends in any way leaves none.
    """

    folder: str | None = None

    def open(
        self, *, device: torch.device, label: str, in_flight_bytes: int = MAX_IN_FLIGHT_BYTES
    ) -> TensorStore:
        folder = Path(self.folder or tempfile.gettempdir())
        return DiskStore(folder, device=device, label=label, in_flight_bytes=in_flight_bytes)
