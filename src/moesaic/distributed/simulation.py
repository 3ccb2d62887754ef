"""Simulation of one rank of a large job in one process, with fake tensors and a fake process group.

Under a ``SimulatedRank`` every new floating-point tensor is fake (a shape, a dtype and a device),
so a trillion parameters take no memory; integers are real, so what depends on them (routing, row
counts) is computed. A collective returns what it would if every rank sent what this one sends:
exact if all ranks have the same number of tokens and experts are chosen evenly.

Use with ``fake_process_group``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as distributed
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic.core.shapes import Tensor
from moesaic.distributed.allocation_ledger import AllocationLedger
from moesaic.distributed.communication_counter import CommunicationCounter
from moesaic.distributed.fake_results import run_on_fake_tensors, tensors_in

_DEVICE_OF = torch.ops.prim.device.default  # half of all operations
_FACTORY_OPS = ("empty", "empty_strided", "zeros", "ones", "full", "rand", "randn")


@contextmanager
def fake_process_group(world_size: int, *, rank: int = 0) -> Iterator[None]:
    """Make a fake process group of ``world_size`` ranks with this process as ``rank``.

    No process group may exist yet.
    """
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        distributed.destroy_process_group()


class OperationObserver(Protocol):
    """Called with every operation of a ``SimulatedRank`` that is no collective."""

    def __call__(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, /
    ) -> None: ...


class SimulatedRank(TorchDispatchMode):
    """Dispatch mode that makes floating-point tensors fake and simulates collectives.

    ``ledger`` counts the bytes of all tensors, fake and real; ``observer`` sees the operations, and
    ``counter`` the collectives (it need not be entered).
    """

    counter: CommunicationCounter | None = None

    def __init__(self, observer: OperationObserver | None = None) -> None:
        super().__init__()
        self._fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.ledger = AllocationLedger()
        self.observer = observer

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is _DEVICE_OF and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local tensors arrive here one by one
        named = kwargs or {}
        tensors = tensors_in((*args, *named.values()))
        fake = any(isinstance(x, FakeTensor) for x in tensors)
        if self.counter is not None:
            self.counter.count(func, args, named)
        if func.namespace == "c10d":
            return func(*args, **named) if fake else _simulate_collective(func, args, named)
        if fake or (not tensors and _creates_floats(func, args, named)):
            out = run_on_fake_tensors(self._fake_mode, func, args, named)
        else:
            out = func(*args, **named)
        for tensor in tensors_in((out,)):
            self.ledger.add(tensor)
        if self.observer is not None:
            self.observer(func, args, named, out)
        return out


class SharedChunks(TorchFunctionMode):
    """Makes ``torch.chunk`` return one view many times: FSDP2 requests thousands and reads two."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return (_shared_chunks if func is torch.chunk else func)(*args, **(kwargs or {}))


def _shared_chunks(tensor: Tensor, chunks: int, dim: int = 0) -> list[Tensor]:
    """Return ``chunks`` chunks, empty ones included (``torch.chunk`` omits those)."""
    length = tensor.shape[dim]
    size = max(1, -(-length // chunks))
    count = max(1, -(-length // size))
    last = tensor.narrow(dim, (count - 1) * size, length - (count - 1) * size)
    first = tensor.narrow(dim, 0, size) if count > 1 else last
    empty = tensor.narrow(dim, 0, 0)
    return [*[first] * (count - 1), last, *[empty] * (chunks - count)]


def _creates_floats(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation without tensor arguments allocates floating-point tensors."""
    if torch.device(kwargs.get("device") or "cpu").type == "meta":
        return False
    if func._opname == "full" and kwargs.get("dtype") is None:
        return isinstance(args[1], float)
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    return func._opname in _FACTORY_OPS and dtype.is_floating_point


def _simulate_collective(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do a collective on real tensors as if every rank gave what this one gives."""
    result = func(*args, **kwargs)  # the fake group allocates the result and fills in nothing
    names = [argument.name for argument in func._schema.arguments]
    call = dict(zip(names, args, strict=False)) | kwargs
    group = distributed.ProcessGroup.unbox(call["process_group"])
    kind = func._opname.strip("_")
    if kind == "alltoall_base":
        rows = call["input_split_sizes"] or [call["input"].shape[0] // group.size()] * group.size()
        block = call["input"].split(rows)[group.rank()]
        for part in call["output"].split(call["output_split_sizes"] or [len(block)] * len(rows)):
            part.copy_(block)
    elif kind == "allgather_base":
        call["output_tensor"].view(group.size(), -1).copy_(call["input_tensor"].reshape(1, -1))
    elif kind == "allgather":
        for part in call["output_tensors"][0]:
            part.copy_(call["input_tensors"][0])
    elif kind == "allreduce":
        for tensor in call["tensors"]:
            tensor.mul_(group.size())
    elif kind not in ("barrier", "broadcast"):
        raise NotImplementedError(f"{func} of real tensors cannot be simulated")
    return result
