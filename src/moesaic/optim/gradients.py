"""Gradients of a step: in ``Parameter.grad`` on the device, or on another memory tier.

On a tier a gradient leaves the device as soon as backward has made it (torch calls a hook after it
has accumulated one, FSDP2 after it has reduced one), and micro-batches add up there, in the same
order as in ``Parameter.grad``. Its norm is taken while it is at hand, so the exact global norm
needs no second reading. Clipping becomes a factor that the update applies: the product of a
gradient and the factor is the value that scaling in place would store.
"""

# pyright: reportPrivateImportUsage=false
# torch._foreach_*: one call for many tensors, as torch.optim itself does it

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.distributed.world import local_tensor
from moesaic.memory.tensor_store import (
    Access,
    FetchedTensors,
    Part,
    Place,
    TensorStore,
    TransferCounter,
    fetch_views,
    rows_of,
)
from moesaic.optim.gradient_clipping import GradNorm, scale_gradients, tensor_norms

Named = tuple[str, Tensor]  # a parameter and its name


class Gradients(ABC):
    """The gradients of the parameters of a rank, between backward and update."""

    @abstractmethod
    def has(self, parameter: Tensor) -> bool:
        """Whether there is a gradient of this parameter."""

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
        """Return a context in which these gradients are in ``Parameter.grad``."""

    @abstractmethod
    def clear(self) -> None:
        """Discard all gradients of a step (those in ``Parameter.grad`` are the optimizer's)."""


class ResidentGradients(Gradients):
    """Gradients on the device, in ``Parameter.grad``."""

    def has(self, parameter: Tensor) -> bool:
        return parameter.grad is not None

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
        if place is Place.DEVICE:
            return FetchedTensors(lambda: views, lambda: None)
        return fetch_views(views, to=torch.device("cpu"), access=Access.READ)

    @contextmanager
    def attached(self, parameters: Sequence[Tensor], *, access: Access) -> Iterator[None]:
        del parameters, access
        yield

    def clear(self) -> None:
        pass


class TieredGradients(Gradients):
    """Gradients in a store; ``left`` counts what has left the device, in bytes."""

    def __init__(
        self, store: TensorStore, parameters: Iterable[Named], *, dtype: torch.dtype
    ) -> None:
        self.store, self.left = store, TransferCounter()
        self._names = {p: name for name, p in parameters if p.requires_grad}
        self._norms: dict[str, Tensor] = {}  # of the gradients that there are
        self._factor = 1.0
        for parameter, name in self._names.items():
            store.allocate(name, local_tensor(parameter).shape, dtype)
            parameter.register_post_accumulate_grad_hook(self._store)
        store.reserve([Part(name) for name in self._names.values()])  # a full disk ends the start

    def has(self, parameter: Tensor) -> bool:
        return self._names.get(parameter, "") in self._norms  # a frozen one is in neither

    def prepare(self, parameters: Iterable[nn.Parameter], *, dtype: torch.dtype) -> None:
        """The store has gradients of ``dtype`` already."""

    def complete(self, parameters: Iterable[nn.Parameter], *, dtype: torch.dtype) -> None:
        for parameter in parameters:
            self._store(parameter)  # schedules that split backward call no hooks
            if not self.has(parameter):
                shape = local_tensor(parameter).shape
                self._add(self._names[parameter], torch.zeros((), dtype=dtype).expand(shape))

    def norms(self, parameters: Sequence[Tensor]) -> list[Float[Tensor, ""]]:
        return [self._norms[self._names[parameter]] for parameter in parameters]

    def clip(self, parameters: Sequence[Tensor], *, norm: float, max_norm: float) -> GradNorm:
        del parameters
        clipped = scale_gradients([], norm=norm, max_norm=max_norm)
        self._factor = clipped.factor
        return clipped

    def fetch(self, parts: Sequence[tuple[Part, Tensor]], *, place: Place) -> FetchedTensors:
        stored = self.store.fetch([part for part, _ in parts], access=Access.READ, place=place)
        factor = self._factor
        if factor == 1.0:
            return stored
        return FetchedTensors(
            lambda: list(torch._foreach_mul(stored.wait(), factor)), stored.release
        )

    @contextmanager
    def attached(self, parameters: Sequence[Tensor], *, access: Access) -> Iterator[None]:
        names = [self._names[parameter] for parameter in parameters]
        fetched = self.store.fetch([Part(name) for name in names], access=access)
        grads = fetched.wait()
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = _like_parameter(grad, parameter)
        yield
        if access is not Access.READ:
            self._norms.update(zip(names, tensor_norms(grads), strict=True))
        for parameter in parameters:
            parameter.grad = None
        fetched.release()

    def clear(self) -> None:
        for parameter in self._names:
            parameter.grad = None
        self._norms, self._factor = {}, 1.0

    @torch.no_grad()
    def _store(self, parameter: Tensor) -> None:
        """Move ``parameter.grad`` to the tier, added to what is there of this step."""
        if parameter.grad is not None:
            grad = local_tensor(parameter.grad)
            self.left.written += grad.numel() * grad.element_size()
            self._add(self._names[parameter], grad)
            parameter.grad = None

    def _add(self, name: str, grad: Tensor) -> None:
        first = name not in self._norms
        access = Access.REPLACE if first else Access.UPDATE
        with self.store.fetch([Part(name)], access=access, place=Place.HOST) as stored:
            stored[0].copy_(grad) if first else stored[0].add_(grad.to(stored[0].device))
            (self._norms[name],) = tensor_norms(stored)


def _local_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [local_tensor(p.grad) for p in parameters if p.grad is not None]


def _like_parameter(grad: Tensor, parameter: Tensor) -> Tensor:
    """Return a local gradient as a DTensor, if the parameter is one."""
    if local_tensor(parameter) is parameter:
        return grad
    sharded: Any = parameter  # a DTensor, of a module that is slow to import
    return type(sharded.data).from_local(
        grad, sharded.device_mesh, sharded.placements, shape=sharded.shape, stride=sharded.stride()
    )
