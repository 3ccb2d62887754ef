"""The boundary to C: one struct of sizes and addresses, two functions.

The tensors whose addresses are in a ``Mixture`` must be contiguous and outlive the call.
"""

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from moesaic.core.shapes import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
ACTIVATION_CODES = {"relu": 0, "relu2": 1, "gelu": 2, "swiglu": 3}

_SIZE_FIELDS = (
    *("tokens", "experts", "dim", "hidden", "width", "activation"),
    *("x_kind", "w_kind", "per_token", "threads"),
)
_POINTER_FIELDS = (
    *("x", "up", "down", "ends", "source", "order", "place", "edge", "first", "weight"),
    *("pre", "rows", "out", "grad", "active", "grad_pre"),
    *("grad_x", "grad_up", "grad_down", "grad_weight"),
)


class MoEArguments(ctypes.Structure):
    """``mixture`` of ``source/mixture.h``, which says what each address is of."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZE_FIELDS),
        *((name, ctypes.c_void_p) for name in _POINTER_FIELDS),
    )


class CPULibraryProtocol(Protocol):
    """What is asked of the compiled library."""

    def forward(self, sizes: Mapping[str, int], tensors: Mapping[str, Tensor | None]) -> None: ...

    def backward(self, sizes: Mapping[str, int], tensors: Mapping[str, Tensor | None]) -> None: ...


class CPULibrary:
    """The library at a path. Other threads of Python run while it computes."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._forward, self._backward = library.moesaic_forward, library.moesaic_backward
        for function in (self._forward, self._backward):
            function.argtypes, function.restype = [ctypes.POINTER(MoEArguments)], ctypes.c_int

    def forward(self, sizes: Mapping[str, int], tensors: Mapping[str, Tensor | None]) -> None:
        """Fill ``out``, and ``pre`` if it is there."""
        _check_status(self._forward(_pack_arguments(sizes, tensors)))

    def backward(self, sizes: Mapping[str, int], tensors: Mapping[str, Tensor | None]) -> None:
        """Fill the gradients that are there."""
        _check_status(self._backward(_pack_arguments(sizes, tensors)))


def _pack_arguments(sizes: Mapping[str, int], tensors: Mapping[str, Tensor | None]) -> MoEArguments:
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    addresses = {name: tensor.data_ptr() for name, tensor in given.items()}
    gone = [name for name, tensor in given.items() if tensor.numel() and not addresses[name]]
    if gone:  # read all the same, it would end the process
        raise RuntimeError(
            f"{', '.join(gone)}: these tensors have a shape but no memory, as parameters have that "
            "were shared out again (ZeRO) and are used outside of their module's pass"
        )
    return MoEArguments(**sizes, **addresses)


def _check_status(code: int) -> None:
    if code:
        raise MemoryError("no memory left for the working space of the experts")
