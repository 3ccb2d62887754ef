"""World: rank, number of processes, device, and the collectives of training outside autograd.

A ``World`` is one process by itself: the same methods, nothing sent. ``ProcessGroupWorld`` is a
rank among others. Every collective returns the same bits on every rank. Nothing here is
differentiable; gradients are summed after backward.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as distributed

from moesaic.core.shapes import Tensor
from moesaic.distributed.flight_recorder import record_collective

BUCKET_BYTES = 64 * 2**20


class World:
    """Rank ``rank`` of ``size`` processes, which computes on ``device``. Here: a single process."""

    rank = 0
    size = 1

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks of a tensor of any shape and dtype, the same on all ranks."""
        return tensor

    def all_reduce_floats(self, values: dict[str, float]) -> dict[str, float]:
        """Return the sums of named numbers; every rank gives the same names."""
        return dict(values)

    def all_reduce_gradients(
        self, parameters: Iterable[Tensor], *, dtype: torch.dtype = torch.float32
    ) -> None:
        """Replace each ``.grad`` by its sum over ranks, computed in ``dtype``.

        A missing gradient counts as zero.
        """

    def any_rank(self, flag: bool, /) -> bool:  # noqa: FBT001
        """Return whether the flag is true on any rank."""
        return flag

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the tensors, in place, with those of rank 0."""

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's value (JSON data) on every rank."""
        return value

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensor of every rank, in rank order; one shape and dtype on all."""
        return [tensor]

    def barrier(self) -> None:
        """Wait for every rank."""


class SingleProcess(World):
    """A world of one process."""


class ProcessGroupWorld(World):
    """A rank of a process group (gloo on CPU, NCCL on CUDA): the default group or a subgroup."""

    def __init__(
        self, device: torch.device | str = "cpu", *, group: distributed.ProcessGroup | None = None
    ) -> None:
        super().__init__(device)
        self._group = group
        self.rank = distributed.get_rank(group)
        self.size = distributed.get_world_size(group)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        total = tensor.detach().to(self.device, copy=True).contiguous()
        with record_collective("all_reduce", group=self._group):
            distributed.all_reduce(total, group=self._group)
        return total.to(tensor.device)

    def all_reduce_floats(self, values: dict[str, float]) -> dict[str, float]:
        names = sorted(values)
        packed = torch.tensor([values[name] for name in names], dtype=torch.float64)
        return dict(zip(names, self.all_reduce(packed).tolist(), strict=True))

    def all_reduce_gradients(
        self, parameters: Iterable[Tensor], *, dtype: torch.dtype = torch.float32
    ) -> None:
        for bucket in _gradient_buckets([p for p in parameters if p.requires_grad]):
            parts = [_local_gradient(p) for p in bucket]
            # offloaded gradients are in host memory, which NCCL cannot read
            flat = torch.cat([part.reshape(-1) for part in parts]).to(self.device, dtype)
            with record_collective("all_reduce", group=self._group):
                distributed.all_reduce(flat, group=self._group)
            sums = flat.split([part.numel() for part in parts])
            for part, total in zip(parts, sums, strict=True):
                part.copy_(total.view_as(part))

    def any_rank(self, flag: bool, /) -> bool:  # noqa: FBT001
        return bool(self.all_reduce(torch.tensor(int(flag))).item())

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            content = tensor.detach().to(self.device, copy=True).contiguous()
            self._broadcast(content)
            tensor.detach().copy_(content)

    def broadcast_object(self, value: Any) -> Any:
        text = json.dumps(value if self.rank == 0 else None).encode()
        length = torch.tensor(len(text), device=self.device)
        self._broadcast(length)
        content = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.rank == 0:
            content.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        self._broadcast(content)
        return json.loads(bytes(content.cpu().tolist()))

    def _broadcast(self, tensor: Tensor) -> None:
        with record_collective("broadcast", group=self._group):
            distributed.broadcast(tensor, group=self._group, group_src=0)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        local = tensor.detach().to(self.device).contiguous()
        parts = [torch.empty_like(local) for _ in range(self.size)]
        with record_collective("all_gather", group=self._group):
            distributed.all_gather(parts, local, group=self._group)
        return [part.to(tensor.device) for part in parts]

    def barrier(self) -> None:
        # an all-reduce: NCCL's barrier has to guess the device
        self.all_reduce(torch.zeros(1))


def _local_gradient(parameter: Tensor) -> Tensor:
    """Return this rank's part of the gradient; zeros where there was none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return local_tensor(parameter.grad)


def _gradient_buckets(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Split into buckets of one dtype and at most ``BUCKET_BYTES`` (or one parameter)."""
    bucket: list[Tensor] = []
    bucket_bytes = 0
    for parameter in parameters:
        size = local_tensor(parameter).numel() * parameter.element_size()
        if bucket and (bucket_bytes + size > BUCKET_BYTES or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, bucket_bytes = [], 0
        bucket.append(parameter)
        bucket_bytes += size
    if bucket:
        yield bucket


def with_local_tensor(like: Tensor, local: Tensor) -> Tensor:
    """Return a DTensor that is placed as ``like``, with another local part; or ``local`` itself."""
    given: Any = like
    if not is_dtensor(like):
        return local
    return type(given).from_local(
        local,
        given.device_mesh,
        given.placements,
        run_check=False,
        shape=given.shape,
        stride=given.stride(),
    )


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the local shard of a DTensor, sharing memory; any other tensor unchanged."""
    given: Any = tensor
    return given.to_local() if is_dtensor(tensor) else tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor, without importing that class, which is slow."""
    return is_dtensor_type(type(tensor))


def is_dtensor_type(kind: type) -> bool:
    """Tell whether a type is DTensor or derived from it."""
    module: Any = sys.modules.get("torch.distributed.tensor")  # imported where there is one
    return module is not None and issubclass(kind, module.DTensor)
