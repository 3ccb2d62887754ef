"""Allocation meter: the bytes of all live tensors of a run, and the most at once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic.distributed.allocation_ledger import AllocationLedger


class AllocationMeter(TorchDispatchMode):
    """Dispatch mode with a ``ledger`` of the tensors that operations return while it is entered.

    What kernels use inside of one operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ledger = AllocationLedger()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else (out,):
            if type(tensor) is torch.Tensor:
                self.ledger.add(tensor)
        return out
