"""Local: the part of a tensor that this rank holds."""

import sys
from typing import Any

from moesaic.core.shapes import Tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Return a DTensor's own part, sharing its memory; any other tensor as it is."""
    # importing DTensor takes longer than everything else that one process needs: who has one did it
    module: Any = sys.modules.get("torch.distributed.tensor")
    given: Any = tensor
    return given.to_local() if module and isinstance(tensor, module.DTensor) else tensor
