"""Allocation ledger: the bytes of all live tensors, and the most at once, exact at every operation.

A storage counts from the first operation that returns it until nothing refers to it; storages that
are resized (ZeRO frees gathered parameters so) count with their present size. ``SimulatedRank``
(``simulation.py``) keeps a ledger of fake tensors, a meter of tests one of real ones.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from moesaic.core.shapes import Tensor


class AllocationLedger:
    """Counts storages. ``live_bytes`` are those in use; ``peak_bytes`` the most since a reset."""

    def __init__(self) -> None:
        self.live_bytes = self.peak_bytes = 0
        self._entries: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def reset_peak(self) -> None:
        """Let the peak start at what is live now."""
        self.peak_bytes = self.live_bytes

    def add(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, if it is not counted yet and not on the meta device."""
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._entries.get(key)
        if known is None or known[0]() is not storage:
            self._forget(key)
            self._entries[key] = (weakref.ref(storage, self._on_free(key)), 0)
            self.resize(storage)

    def resize(self, storage: torch.UntypedStorage) -> None:
        """Count a storage with its present size, if it is counted at all."""
        entry = self._entries.get(storage._cdata)
        if entry is not None and entry[0]() is storage:
            size = storage.nbytes()
            self._entries[storage._cdata] = (entry[0], size)
            self.live_bytes += size - entry[1]
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    @contextmanager
    def watch_resizes(self) -> Iterator[None]:
        """Notice resized storages, which no operation reports."""
        original = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, *size: Any) -> Any:
            result = original(storage, *size)
            self.resize(storage)
            return result

        setattr(torch.UntypedStorage, "resize_", resize)  # noqa: B010
        try:
            yield
        finally:
            setattr(torch.UntypedStorage, "resize_", original)  # noqa: B010

    def _on_free(self, key: int) -> Callable[[Any], None]:
        def forget(reference: Any) -> None:
            entry = self._entries.get(key)
            if entry is not None and entry[0] is reference:
                self._forget(key)

        return forget

    def _forget(self, key: int) -> None:
        entry = self._entries.pop(key, None)
        self.live_bytes -= 0 if entry is None else entry[1]
