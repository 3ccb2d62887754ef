"""Gradients of a step: in ``Parameter.grad`` on the device, or on another memory tier.

On a tier a gradient leaves the device as soon as backward has made it (torch calls a hook after it
has accumulated one, FSDP2 after it has reduced one), and micro-batches add up there, in the same
order as in ``Parameter.grad``. With a GPU it leaves through a ring of pinned buffers and a thread
adds it up, while backward goes on; who reads a gradient waits for it.

Of the experts in ``banks`` only those whose gradient is not zero are moved; the others are zeros
wherever gradients are read. The norm of a gradient is taken while it is at hand, so the exact
global norm needs no second reading. Clipping becomes a factor that the update applies: the product
of a gradient and the factor is the value that scaling in place would store.
"""

# pyright: reportPrivateImportUsage=false
# torch._foreach_*: one call for many tensors, as torch.optim itself does it

from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.distributed.world import local_tensor
from moesaic.memory.named_copies import NamedCopies
from moesaic.memory.pinned_ring import PinnedRing
from moesaic.memory.tensor_store import (
    Access,
    FetchedTensors,
    Part,
    Place,
    TensorStore,
    TransferCounter,
    rows_of,
)
from moesaic.optim.gradient_clipping import (
    GradNorm,
    norm_of_norms,
    scale_gradients,
    tensor_norms,
)

Named = tuple[str, Tensor]  # a parameter and its name


class Gradients(ABC):
    """The gradients of the parameters of a rank, between backward and update."""

    @abstractmethod
    def has(self, parameter: Tensor) -> bool:
        """Whether there is a gradient of this parameter."""

    @abstractmethod
    def touched(self, parameter: Tensor) -> list[int]:
        """Return the experts whose gradients of these weights ``[E, M, N]`` are not all zero."""

    @abstractmethod
    def prepare(self, parameters: Iterable[nn.Parameter], *, dtype: torch.dtype) -> None:
        """Start missing gradients of these narrower parameters at zeros of ``dtype``."""

    @abstractmethod
    def complete(self, parameters: Iterable[nn.Parameter], *, dtype: torch.dtype) -> None:
        """Make the gradients of parameters that no backward pass reached zeros."""

    @abstractmethod
    def norms(self, parameters: Sequence[Tensor]) -> list[Float[Tensor, ""]]:
        """Return the 2-norm of each gradient, in float32."""

    @abstractmethod
    def clip(self, parameters: Sequence[Tensor], *, norm: float, max_norm: float) -> GradNorm:
        """Scale gradients of global norm ``norm`` to at most ``max_norm``."""

    @abstractmethod
    def fetch(self, parts: Sequence[tuple[Part, Tensor]], *, place: Place) -> FetchedTensors:
        """Bring the gradients of parts of parameters to ``place``, clipped, to be read."""

    @abstractmethod
    def attached(self, parameters: Sequence[Tensor], *, access: Access) -> Any:
        """Return a context with this rank's part of these gradients, on the device.

        They are in ``Parameter.grad`` as well, but for parameters that are elsewhere at the time.
        """

    @abstractmethod
    def clear(self) -> None:
        """Discard all gradients of a step (those in ``Parameter.grad`` are the optimizer's)."""


class ResidentGradients(Gradients):
    """Gradients on the device, in ``Parameter.grad``; ``copies`` bring them to the host."""

    def __init__(self, copies: NamedCopies | None = None) -> None:
        self._copies = copies

    def has(self, parameter: Tensor) -> bool:
        return parameter.grad is not None

    def touched(self, parameter: Tensor) -> list[int]:
        (grad,) = _local_gradients([parameter])
        return _nonzero_experts(grad)

    def prepare(self, parameters: Iterable[nn.Parameter], *, dtype: torch.dtype) -> None:
        self.complete(parameters, dtype=dtype)

    def complete(self, parameters: Iterable[nn.Parameter], *, dtype: torch.dtype) -> None:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=dtype)

    def norms(self, parameters: Sequence[Tensor]) -> list[Float[Tensor, ""]]:
        return tensor_norms(_local_gradients(parameters))

    def clip(self, parameters: Sequence[Tensor], *, norm: float, max_norm: float) -> GradNorm:
        return scale_gradients(_local_gradients(parameters), norm=norm, max_norm=max_norm)

    def fetch(self, parts: Sequence[tuple[Part, Tensor]], *, place: Place) -> FetchedTensors:
        whole = _local_gradients([parameter for _, parameter in parts])
        views = [rows_of(grad, part) for (part, _), grad in zip(parts, whole, strict=True)]
        if place is Place.DEVICE or self._copies is None:
            return FetchedTensors(lambda: views, lambda: None)
        named = [(part.name, view) for (part, _), view in zip(parts, views, strict=True)]
        return self._copies.fetch(named, place=place, access=Access.READ)

    @contextmanager
    def attached(self, parameters: Sequence[Tensor], *, access: Access) -> Iterator[list[Tensor]]:
        del access
        for parameter in parameters:
            if parameter.grad is None:
                # while FSDP2 has a module gathered, the model names others than its shards
                parameter.grad = torch.zeros_like(parameter)
        yield _local_gradients(parameters)

    def clear(self) -> None:
        pass


class TieredGradients(Gradients):
    """Gradients in a store; ``left`` counts what has left the device, in bytes.

    A parameter is stored in blocks: one, or for those named in ``banks`` one for each expert.
    """

    def __init__(
        self,
        store: TensorStore,
        parameters: Iterable[Named],
        *,
        dtype: torch.dtype,
        banks: Container[str] = (),
    ) -> None:
        self.store, self.left = store, TransferCounter()
        copies = store.copies
        self._ring = copies and PinnedRing(copies, num_bytes=store.in_flight_bytes)
        self._leaving: dict[str, futures.Future[None]] = {}
        self._names = {p: name for name, p in parameters if p.requires_grad}
        self._banks = {name for name in self._names.values() if name in banks}
        self._norms: dict[str, dict[Part, Tensor]] = {}  # of the blocks that there are
        self._factor = 1.0
        for parameter, name in self._names.items():
            store.allocate(name, local_tensor(parameter).shape, dtype)
            parameter.register_post_accumulate_grad_hook(self._store)
        store.reserve([Part(name) for name in self._names.values()])  # a full disk ends the start

    def has(self, parameter: Tensor) -> bool:
        return self._names.get(parameter, "") in self._norms  # a frozen one is in neither

    def touched(self, parameter: Tensor) -> list[int]:
        return [block.start for block in self._arrived(self._names[parameter])]

    def prepare(self, parameters: Iterable[nn.Parameter], *, dtype: torch.dtype) -> None:
        """The store has gradients of ``dtype`` already."""

    def complete(self, parameters: Iterable[nn.Parameter], *, dtype: torch.dtype) -> None:
        for parameter in parameters:
            self._store(parameter)  # schedules that split backward call no hooks
            if not self.has(parameter):
                shape = local_tensor(parameter).shape
                zeros = torch.zeros((), dtype=dtype).expand(shape)
                self._add(self._names[parameter], zeros, ring=None)

    def norms(self, parameters: Sequence[Tensor]) -> list[Float[Tensor, ""]]:
        return [self._norm(self._names[parameter]) for parameter in parameters]

    def clip(self, parameters: Sequence[Tensor], *, norm: float, max_norm: float) -> GradNorm:
        del parameters
        clipped = scale_gradients([], norm=norm, max_norm=max_norm)
        self._factor = clipped.factor
        return clipped

    def fetch(self, parts: Sequence[tuple[Part, Tensor]], *, place: Place) -> FetchedTensors:
        stored = self._fetch([part for part, _ in parts], place=place)
        factor = self._factor
        if factor == 1.0:
            return stored
        return FetchedTensors(
            lambda: list(torch._foreach_mul(stored.wait(), factor)), stored.release
        )

    @contextmanager
    def attached(self, parameters: Sequence[Tensor], *, access: Access) -> Iterator[list[Tensor]]:
        names = [self._names[parameter] for parameter in parameters]
        whole = self._fetch([Part(name) for name in names], place=Place.DEVICE)
        grads = whole.wait()
        for parameter, grad in zip(parameters, grads, strict=True):
            if parameter.device == grad.device:  # a streamed parameter rests on the host
                parameter.grad = _like_parameter(grad, parameter)
        yield grads
        whole.release()
        for parameter, name, grad in zip(parameters, names, grads, strict=True):
            parameter.grad = None
            if access is not Access.READ:
                del self._norms[name]
                self._add(name, grad, ring=self._ring)

    def clear(self) -> None:
        for parameter in self._names:
            parameter.grad = None
        futures.wait(self._leaving.values())  # of a step that has failed
        self._norms, self._factor, self._leaving = {}, 1.0, {}

    @torch.no_grad()
    def _store(self, parameter: Tensor) -> None:
        """Move ``parameter.grad`` to the tier, added to what is there of this step."""
        if parameter.grad is not None:
            name, grad = self._names[parameter], local_tensor(parameter.grad)
            self.left.written += self._add(name, grad, ring=self._ring)
            parameter.grad = None

    def _arrived(self, name: str) -> dict[Part, Tensor]:
        """Return the norms of the blocks of a gradient, all of which is in the store."""
        leaving = self._leaving.get(name)
        if leaving is not None:
            leaving.result()
            self._leaving.pop(name, None)
        return self._norms.setdefault(name, {})

    def _add(self, name: str, grad: Tensor, *, ring: PinnedRing | None) -> int:
        """Add a gradient to what there is of this step; return the bytes of the blocks moved.

        Through a ring it may be under way until ``_arrived``.
        """
        known = self._arrived(name)
        blocks = [Part(name)]
        if name in self._banks:
            blocks = [Part(name, expert, expert + 1) for expert in _nonzero_experts(grad)]
        new = [block for block in blocks if block not in known]
        old = [block for block in blocks if block in known]
        rows = [rows_of(grad, part) for part in (*new, *old)]
        if ring is None:
            self._merge(known, iter(rows), new=new, old=old)
        elif rows:
            self._leaving[name] = ring.send(rows, partial(self._merge, known, new=new, old=old))
        return sum(self.store.specs[name].of(block).num_bytes for block in blocks)

    @torch.no_grad()
    def _merge(
        self,
        known: dict[Part, Tensor],
        values: Iterator[Tensor],
        *,
        new: Sequence[Part],
        old: Sequence[Part],
    ) -> None:
        """Store the values of new blocks, then add those of old ones; take the norms."""
        for access, moving in ((Access.REPLACE, new), (Access.UPDATE, old)):
            if not moving:
                continue
            with self.store.fetch(moving, access=access, place=Place.HOST) as stored:
                for to in stored:
                    for target, piece in _pieces(to, values):
                        target.copy_(piece) if access is Access.REPLACE else target.add_(piece)
                known.update(zip(moving, tensor_norms(stored), strict=True))

    def _norm(self, name: str) -> Float[Tensor, ""]:
        known = self._arrived(name)
        if name not in self._banks:
            return known[Part(name)]
        experts = self.store.specs[name].shape[0]
        blocks = [Part(name, expert, expert + 1) for expert in range(experts)]
        return norm_of_norms([known.get(block, torch.zeros(())) for block in blocks])

    def _fetch(self, parts: Sequence[Part], *, place: Place) -> FetchedTensors:
        """Bring parts to ``place``; what no block has moved is zeros there."""
        for part in parts:
            self._arrived(part.name)
        blocks = [(part, self._blocks_of(part)) for part in parts]
        flat = [block for _, each in blocks for block in each]
        fetched = self.store.fetch(flat, access=Access.READ, place=place)

        def wait() -> list[Tensor]:
            stored = iter(fetched.wait())
            pairs = (
                (p, dict(zip(each, islice(stored, len(each)), strict=True))) for p, each in blocks
            )
            return [self._assembled(part, found, place=place) for part, found in pairs]

        return FetchedTensors(wait, fetched.release)

    def _blocks_of(self, part: Part) -> list[Part]:
        """Return the blocks of a part that are stored; all of it, if it is no bank's."""
        if part.name not in self._banks:
            return [part]
        known, stop = self._norms[part.name], part.stop or self.store.specs[part.name].shape[0]
        return [block for block in known if part.start <= block.start < stop]

    def _assembled(self, part: Part, stored: Mapping[Part, Tensor], *, place: Place) -> Tensor:
        if part in stored:
            return stored[part]
        spec = self.store.specs[part.name].of(part)
        device = self.store.device if place is Place.DEVICE else torch.device("cpu")
        whole = torch.zeros(spec.shape, dtype=spec.dtype, device=device)
        for block, tensor in stored.items():
            whole[block.start - part.start].copy_(tensor[0])
        return whole


def _pieces(stored: Tensor, values: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a stored tensor with its values: whole, or part by part with flat pieces of them."""
    done = 0
    while done < stored.numel():
        piece = next(values)
        whole = piece.shape == stored.shape
        target = stored if whole else stored.view(-1)[done : done + piece.numel()]
        yield target, piece
        done += piece.numel()


def _local_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [local_tensor(p.grad) for p in parameters if p.grad is not None]


def _nonzero_experts(grad: Tensor) -> list[int]:
    """Return the experts whose part of ``[E, M, N]`` has a value that is not zero (or is NaN)."""
    return grad.flatten(1).any(1).nonzero().flatten().tolist()


def _like_parameter(grad: Tensor, parameter: Tensor) -> Tensor:
    """Return a local gradient as a DTensor, if the parameter is one."""
    if local_tensor(parameter) is parameter:
        return grad
    sharded: Any = parameter  # a DTensor, of a module that is slow to import
    return type(sharded.data).from_local(
        grad, sharded.device_mesh, sharded.placements, shape=sharded.shape, stride=sharded.stride()
    )
