"""Activation offload: what autograd saves in blocks goes to a memory tier, and back in backward.

A saved tensor is a view of a storage: whole storages are moved, each once, so the views that
backward gets have the strides that they had. In backward each returns once, and stays until its
last use; the storage that was saved before it is fetched meanwhile. Weights stay where they are,
and so do small tensors.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import nn
from torch.autograd import Variable
from torch.multiprocessing.reductions import StorageWeakRef

from moesaic.core.shapes import Tensor
from moesaic.distributed.world import is_dtensor
from moesaic.memory.tensor_store import Access, FetchedTensors, Part, TensorStore
from moesaic.model.block import BlockState
from moesaic.model.transformer import RunBlock, Transformer

MIN_BYTES = 1 << 12  # smaller tensors cost more time than they free memory
SIZE_STEPS = 8  # sizes of slots between two powers of two
Kept = TypeVar("Kept")


class SlotPool:
    """Byte ranges of a store that are used again: activations of steps differ in size."""

    def __init__(self, store: TensorStore) -> None:
        self.store = store
        self._free: dict[int, list[str]] = defaultdict(list)

    def take(self, num_bytes: int) -> str:
        """Return the name of a free slot of at least so many bytes."""
        size = slot_bytes(num_bytes)
        if self._free[size]:
            return self._free[size].pop()
        name = f"slot.{len(self.store.specs)}"
        self.store.allocate(name, (size,), torch.uint8)
        return name

    def give_back(self, name: str) -> None:
        """Mark a slot as free."""
        self._free[self.store.specs[name].shape[0]].append(name)


def slot_bytes(num_bytes: int) -> int:
    """Return the bytes of the slot of a storage of so many."""
    step = max(1, (1 << (num_bytes - 1).bit_length()) // (2 * SIZE_STEPS))
    return -(-num_bytes // step) * step


class OffloadedStorage:
    """The bytes of one storage in a slot, which is freed with the last saved view of them.

    ``previous`` is the storage that was saved before it, which backward probably needs next.
    ``content`` are the bytes on the device again.
    """

    def __init__(
        self, tensor: Tensor, *, pool: SlotPool, previous: "OffloadedStorage | None"
    ) -> None:
        content = _bytes_of(tensor)
        self.num_bytes = content.numel()
        self.content: Tensor | None = None
        self.previous = None if previous is None else weakref.ref(previous)
        self._pool, self._slot = pool, pool.take(self.num_bytes)
        pool.store.write(Part(self._slot, 0, self.num_bytes), content)

    def __del__(self) -> None:
        self._pool.give_back(self._slot)

    def fetch(self) -> FetchedTensors:
        """Start to bring the bytes back to the device."""
        part = Part(self._slot, 0, self.num_bytes)
        return self._pool.store.fetch([part], access=Access.READ)


class SavedView(NamedTuple):
    """A saved tensor as a view of an offloaded storage."""

    storage: OffloadedStorage
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    def on_device(self) -> Tensor:
        """Return the view of the storage's content."""
        content = self.storage.content
        assert content is not None
        empty = torch.empty(0, dtype=self.dtype, device=content.device)
        return empty.set_(content.untyped_storage(), self.offset, self.shape, self.stride)


class SavedStorages(Generic[Kept]):
    """The storages of activations that a block saves, each version once."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[StorageWeakRef, Kept]] = {}

    def find(self, tensor: Tensor, *, make: Callable[[], Kept]) -> Kept | None:
        """Return what there is of a saved tensor's storage; None: it stays where it is."""
        storage = tensor.untyped_storage()
        if not _is_activation(tensor) or storage.nbytes() < MIN_BYTES:
            return None
        key = storage._cdata, tensor._version
        known = self._known.get(key)
        if known is None or known[0].expired():
            known = self._known[key] = StorageWeakRef(storage), make()
        return known[1]


class ActivationOffload:
    """Runs blocks, with what autograd saves of them on a store. One backward runs at a time."""

    def __init__(self, run_block: RunBlock, *, store: TensorStore) -> None:
        self.store, self._run_block = store, run_block
        self._pool = SlotPool(store)
        self._saved = SavedStorages[OffloadedStorage]()
        self._newest: weakref.ref[OffloadedStorage] | None = None
        self._coming: tuple[OffloadedStorage, FetchedTensors] | None = None
        self._in_backward = False

    def __call__(self, block: nn.Module, state: BlockState, **inputs: Any) -> BlockState:
        if not torch.is_grad_enabled():
            return self._run_block(block, state, **inputs)
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            output = self._run_block(block, state, **inputs)
        self._saved = SavedStorages()
        return output

    def _pack(self, tensor: Tensor) -> Tensor | SavedView:
        def offload() -> OffloadedStorage:
            newest = None if self._newest is None else self._newest()
            made = OffloadedStorage(tensor, pool=self._pool, previous=newest)
            self._newest = weakref.ref(made)
            return made

        known = self._saved.find(tensor, make=offload)
        if known is None:
            return tensor
        offset = int(tensor.storage_offset())
        return SavedView(known, tensor.dtype, offset, tensor.shape, tensor.stride())

    def _unpack(self, saved: Tensor | SavedView) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        if not self._in_backward:
            self._in_backward = True
            Variable._execution_engine.queue_callback(self._end_backward)
        if saved.storage.content is None:
            self._bring(saved.storage)
        return saved.on_device()

    def _bring(self, storage: OffloadedStorage) -> None:
        if self._coming is None or self._coming[0] is not storage:
            self._receive()  # fetched out of turn: it is used later
            self._coming = storage, storage.fetch()
        self._receive()
        previous = storage.previous and storage.previous()
        if previous is not None and previous.content is None:
            self._coming = previous, previous.fetch()

    def _receive(self) -> None:
        if self._coming is not None:
            storage, coming = self._coming
            storage.content = coming.wait()[0].clone()  # the slot and the buffer are used again
            coming.release()
            self._coming = None

    def _end_backward(self) -> None:
        self._in_backward = False
        if self._coming is not None:
            self._coming[1].release()
            self._coming = None


def offload_activations(model: Transformer, *, store: TensorStore) -> ActivationOffload:
    """Offload what the blocks of a model save for backward."""
    offload = ActivationOffload(model.run_block, store=store)
    model.run_block = offload
    return offload


def _is_activation(tensor: Tensor) -> bool:
    is_weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
    return not (is_weight or is_dtensor(tensor))


def _bytes_of(tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
