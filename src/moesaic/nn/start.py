"""Start: how a module's parameters start, where it knows better than the table (``Init``)."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True)
class Start:
    """One parameter's ``kind``, and the standard deviation it starts with (zero: as zeros).

    ``fan_in`` is how many values one result adds up, where the shape does not say. None leaves the
    matter to the table (``Init``).
    """

    kind: str | None = None
    std: float | None = None
    fan_in: float | None = None


class OwnStart(nn.Module):
    """Base of modules of which some parameters start in a way of their own."""

    def starts(self) -> Mapping[str, Start]:
        """Return those parameters, by their names in this module."""
        raise NotImplementedError


def own_starts(model: nn.Module) -> dict[str, Start]:
    """What the modules of a model say of their parameters, by name in the model."""
    return {
        f"{path}.{name}" if path else name: start
        for path, module in model.named_modules()
        if isinstance(module, OwnStart)
        for name, start in module.starts().items()
    }
