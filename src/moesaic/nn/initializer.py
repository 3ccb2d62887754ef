"""Start: how a module's parameters start, where it knows better than the table (``InitConfig``)."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True)
class Initializer:
    """One parameter's ``kind``, and the standard deviation it starts with (zero: as zeros).

    ``fan_in`` is how many values one result adds up, where the shape does not say. None leaves the
    matter to the table (``InitConfig``).
    """

    kind: str | None = None
    std: float | None = None
    fan_in: float | None = None


class CustomInitializers(nn.Module):
    """Base of modules of which some parameters start in a way of their own."""

    def initializers(self) -> Mapping[str, Initializer]:
        """Return those parameters, by their names in this module."""
        raise NotImplementedError


def custom_initializers(model: nn.Module) -> dict[str, Initializer]:
    """What the modules of a model say of their parameters, by name in the model."""
    return {
        f"{path}.{name}" if path else name: start
        for path, module in model.named_modules()
        if isinstance(module, CustomInitializers)
        for name, start in module.initializers().items()
    }
