"""Initializers: initial values of parameters, drawn when a module is made.

A module draws its parameters (``normal_parameter``) with the default standard deviations of this
file. A model draws all of its weights at once instead, in the order of ``named_parameters`` and by
its ``InitConfig``: it makes its modules under ``deferred_initialization``.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import nn

from moesaic.core.shapes import Tensor

_deferred: ContextVar[bool] = ContextVar("deferred", default=False)


@contextmanager
def deferred_initialization() -> Iterator[None]:
    """Leave parameters made by ``normal_parameter`` without values; the caller must draw them."""
    token = _deferred.set(True)
    try:
        yield
    finally:
        _deferred.reset(token)


def normal_parameter(*shape: int, std: float) -> nn.Parameter:
    """Return a float32 parameter drawn from a normal distribution; zeros for ``std`` 0.

    Draws from torch's global generator. On the meta device nothing is allocated or drawn.
    """
    parameter = nn.Parameter(torch.empty(shape))
    if not _deferred.get():
        with torch.no_grad():
            parameter.normal_(std=std) if std else parameter.zero_()
    return parameter


def router_std(fan_in: int) -> float:
    """Return the default of a map to router logits: Switch (2101.03961, section 2.4)."""
    return (0.1 / fan_in) ** 0.5


def fan_in_std(fan_in: float) -> float:
    """Return the default of matrices, expert weights and (with the model dim) embeddings."""
    return fan_in**-0.5


@dataclass(frozen=True, slots=True)
class Initializer:
    """One parameter's ``kind``, and its initial standard deviation (0: zeros).

    ``fan_in`` is the number of values that one output sums, where it does not follow from the
    shape. None leaves the choice to ``InitConfig``. ``draw`` fills a whole parameter in place in
    some other way, with torch's global generator where it is random.
    """

    kind: str | None = None
    std: float | None = None
    fan_in: float | None = None
    draw: Callable[[Tensor], object] | None = None


class CustomInitializers(nn.Module):
    """Base of modules that initialize some of their parameters in their own way."""

    def initializers(self) -> Mapping[str, Initializer]:
        """Return the initializers of those parameters, by their names in this module."""
        raise NotImplementedError


def custom_initializers(model: nn.Module) -> dict[str, Initializer]:
    """Return the custom initializers of a model, by parameter name in the model."""
    return {
        f"{path}.{name}" if path else name: start
        for path, module in model.named_modules()
        if isinstance(module, CustomInitializers)
        for name, start in module.initializers().items()
    }
