"""Local: the part of a tensor that this rank holds."""

from typing import Any, cast

import torch
from torch import nn

from moesaic.core.shapes import Tensor

_PLAIN = (torch.Tensor, nn.Parameter)


def local(tensor: Tensor) -> Tensor:
    """Return a DTensor's own part, sharing its memory; any other tensor as it is."""
    # by exact type: importing DTensor takes longer than everything else that one process needs
    return tensor if type(tensor) in _PLAIN else cast("Any", tensor).to_local()
