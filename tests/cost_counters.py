"""Counters of work for cost laws: operations, bytes held, store messages, open files.

Bytes sent are those of ``distributed/communication_counter.py``.
"""

import inspect
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as distributed
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moesaic.distributed.allocation_ledger import AllocationLedger

LEFT_FACTOR = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # which argument of a product
WAITS = ("item", "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique")


@dataclass(frozen=True)
class CostLaw:
    """``count(n)`` is counted work, and ``formula(n)`` the most that it may be (less 10 %).

    A formula of more than twice the count is refused as well: it would see no fault.
    """

    count: Callable[[int], float]
    formula: Callable[[int], float]
    size: int


class OperationCounter(TorchDispatchMode):
    """Counts operations by name, and the FLOPs of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.flops = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name, out = func.__name__.partition(".")[0], func(*args, **(kwargs or {}))
        self.names[name] += 1
        if name in LEFT_FACTOR:
            self.flops += 2 * out.numel() * args[LEFT_FACTOR[name]].shape[-1]
        return out

    @property
    def total(self) -> int:
        return self.names.total()

    @property
    def waits(self) -> int:
        """The operations whose result the host reads."""
        return sum(self.names[name] for name in WAITS)


class AllocationMeter(TorchDispatchMode):
    """Keeps a ``ledger`` of the storages that operations make while it is entered.

    What existed before does not count, and what a kernel uses inside of one operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ledger = AllocationLedger()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            if tensor.untyped_storage()._cdata not in given:
                self.ledger.add(tensor)
        return out


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def count_operations(function: Callable[[], object]) -> int:
    """Return the number of tensor operations of a call."""
    with OperationCounter() as counter:
        function()
    return counter.total


def count_flops(function: Callable[[], object]) -> int:
    """Return the FLOPs of the matrix products of a call."""
    with OperationCounter() as counter:
        function()
    return counter.flops


def peak_bytes(function: Callable[[], object]) -> int:
    """Return the most bytes at once that a call holds beside what existed before."""
    with AllocationMeter() as meter:
        function()
    return meter.ledger.peak_bytes


class CountingStore:
    """A rendezvous store in memory, for ranks in one process; counts messages and their bytes."""

    def __init__(self) -> None:
        self._store = distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        self.messages = self.bytes = 0

    def _count(self, content: Any = b"") -> None:
        self.messages += 1
        self.bytes += len(content)

    def set(self, key: str, value: str) -> None:
        self._count(value)
        self._store.set(key, value)

    def add(self, key: str, amount: int) -> int:
        self._count()
        return self._store.add(key, amount)

    def get(self, key: str) -> bytes:
        value = self._store.get(key)
        self._count(value)
        return value

    def check(self, keys: Sequence[str]) -> bool:
        self._count()
        return self._store.check(list(keys))

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        values = [self._store.get(key) for key in keys]
        self._count(b"".join(values))
        return values


def open_files() -> int:
    """Return the number of file descriptors that this process has open."""
    return len(os.listdir("/proc/self/fd"))


HOST_READS = ("item", "tolist", "cpu", "numpy", "__int__", "__float__", "__bool__", "__index__")
DATA_SIZED = ("nonzero", "bincount", "masked_select", "unique", "argwhere", "equal", "allclose")


class HostReads(TorchFunctionMode):
    """Collects the places in the package where the host reads a tensor or a size that is in one.

    On a GPU each waits for all enqueued work. ``places`` counts them by ``file.py:function``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name, named = getattr(func, "__name__", ""), kwargs or {}
        if (
            name in HOST_READS
            or name in DATA_SIZED
            or (name in ("__getitem__", "__setitem__") and _has_mask(args[1]))
            or (name == "repeat_interleave" and _repeats_wait(args, named))
            or (name == "where" and len(args) == 1)
        ):
            self.places[_caller()] += 1
        return func(*args, **named)


def _has_mask(index: Any) -> bool:
    return any(t.dtype in (torch.bool, torch.uint8) and t.ndim for t in _tensors(index))


def _repeats_wait(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(_tensors(args[1:])) and kwargs.get("output_size") is None


def _caller() -> str:
    """Return the innermost function of the package that is being called."""
    frame = inspect.currentframe()
    while frame is not None and "/moesaic/" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None:
        return "a test"
    return f"{frame.f_code.co_filename.partition('/moesaic/')[2]}:{frame.f_code.co_name}"
