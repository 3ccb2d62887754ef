"""Autocast for operations of our own: torch casts the inputs of its own matrix products only."""

import torch

from moesaic.core.shapes import Tensor


def as_autocast(x: Tensor) -> Tensor:
    """Return rows in the dtype of autocast matrix products, if autocast is on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
