"""Gradient sums: all-reduces of replicated gradients in buckets, which overlap the backward pass.

A bucket is summed as soon as the last backward pass of a step has made all its gradients; what is
left is summed afterwards. Buckets are the same and in the same order on every rank and in every
step, so the sums have the same bits whether they overlap or not. They have process groups of their
own: a rank without gradients for some experts starts a bucket later than others, and collectives of
one group must be in one order.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as distributed
from torch import nn

from moesaic.core.shapes import Tensor
from moesaic.distributed.flight_recorder import record_collective
from moesaic.distributed.process_groups import Group, new_group
from moesaic.distributed.world import BUCKET_BYTES, local_tensor
from moesaic.memory.tensor_store import Access
from moesaic.optim.gradients import Gradients, ResidentGradients

IN_FLIGHT = 2  # buckets whose copies are in memory at once


@dataclass(frozen=True, slots=True)
class ReplicatedParameter:
    """A parameter and the ranks that have copies of it; ``ranks`` is sorted."""

    parameter: nn.Parameter
    ranks: tuple[int, ...]
    sharded_by_zero: bool


@dataclass(slots=True)
class _Bucket:
    ranks: tuple[int, ...]
    members: list[ReplicatedParameter] = field(default_factory=list)
    bytes: int = 0
    missing: int = 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [each.parameter for each in self.members]


class GradientSums:
    """Sums the gradients of ``replicated`` over the ranks that have copies. Collective to make.

    Sums are made in ``dtype``, whatever the type of the gradients; ``on_sum`` is told of each.
    """

    def __init__(
        self,
        replicated: Sequence[ReplicatedParameter],
        *,
        device: torch.device,
        dtype: torch.dtype,
        timeout_s: float,
        on_sum: Callable[[nn.Parameter], None],
    ) -> None:
        self._device, self._dtype, self._on_sum = device, dtype, on_sum
        self._buckets = list(_make_buckets(replicated))
        self._groups: dict[tuple[int, ...], Group] = {
            ranks: new_group(ranks, timeout_s=timeout_s)
            for ranks in dict.fromkeys(bucket.ranks for bucket in self._buckets)
        }
        self._started, self._is_last = 0, False
        self._in_flight: list[tuple[_Bucket, Tensor, Any]] = []
        for bucket in self._buckets:
            for each in bucket.members:
                # FSDP2 assigns gradients itself, after it has reduced them
                if not each.sharded_by_zero:
                    each.parameter.register_post_accumulate_grad_hook(self._hook(bucket))

    def before_last_backward(self) -> None:
        """Sum buckets during the backward pass that follows."""
        self._started, self._is_last = 0, True
        for bucket in self._buckets:
            bucket.missing = len(bucket.members)

    def finish(self, gradients: Gradients) -> None:
        """Sum the buckets that are left, and wait for all. Every parameter has a gradient."""
        for bucket in self._buckets[self._started :]:
            self._start(bucket, gradients)
        while self._in_flight:
            self._wait_for_oldest(gradients)
        self._started, self._is_last = 0, False

    def _hook(self, bucket: _Bucket) -> Any:
        def gradient_is_ready(_: Tensor) -> None:
            if self._is_last:
                bucket.missing -= 1
                while self._started < len(self._buckets):
                    following = self._buckets[self._started]
                    if following.missing:
                        return
                    self._start(following, ResidentGradients())
                    self._started += 1

        return gradient_is_ready

    def _start(self, bucket: _Bucket, gradients: Gradients) -> None:
        if len(self._in_flight) == IN_FLIGHT:
            self._wait_for_oldest(gradients)
        with gradients.attached(bucket.parameters, access=Access.READ) as local:
            flat = torch.cat([part.reshape(-1) for part in local]).to(self._device, self._dtype)
        work = distributed.all_reduce(flat, group=self._groups[bucket.ranks], async_op=True)
        self._in_flight.append((bucket, flat, work))

    def _wait_for_oldest(self, gradients: Gradients) -> None:
        bucket, flat, work = self._in_flight.pop(0)
        with record_collective("all_reduce", group=self._groups[bucket.ranks]):
            work.wait()
        with gradients.attached(bucket.parameters, access=Access.UPDATE) as local:
            for part, total in zip(local, flat.split([p.numel() for p in local]), strict=True):
                part.copy_(total.view_as(part))
        for parameter in bucket.parameters:
            self._on_sum(parameter)


def _make_buckets(replicated: Sequence[ReplicatedParameter]) -> Iterator[_Bucket]:
    """Yield buckets of at most ``BUCKET_BYTES``, the last parameters first, as backward goes."""
    filling: dict[tuple[int, ...], _Bucket] = {}
    for each in reversed(replicated):
        size = local_tensor(each.parameter).numel() * each.parameter.element_size()
        bucket = filling.setdefault(each.ranks, _Bucket(each.ranks))
        if bucket.members and bucket.bytes + size > BUCKET_BYTES:
            yield bucket
            bucket = filling[each.ranks] = _Bucket(each.ranks)
        bucket.members.append(each)
        bucket.bytes += size
    yield from filling.values()
