"""Initializers: initial distributions of parameters that differ from those of ``InitConfig``."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True)
class Initializer:
    """One parameter's ``kind``, and its initial standard deviation (0: zeros).

    ``fan_in`` is the number of values that one output sums, where it does not follow from the
    shape. None leaves the choice to ``InitConfig``.
    """

    kind: str | None = None
    std: float | None = None
    fan_in: float | None = None


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
