"""Operation recorder: kind, FLOPs and bytes of the operations of a simulated rank.

FLOPs are two per multiplication and addition of matrix products and attention (half the scores
where attention is causal), as ``model/parameter_flop_count.py`` counts them; other operations have
none. Bytes are those of an operation's arguments and results, each read or written once. Views
cost nothing.
"""

import importlib
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

import torch

from moesaic.core.shapes import Tensor
from moesaic.distributed.fake_results import is_view, tensors_in

_IN_PLACE = {  # the counter of FLOPs has no entries of these
    torch.ops.aten.addmm_: torch.ops.aten.addmm,
    torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm,
}


class OperationKind(StrEnum):
    """What bounds an operation: products by their shapes, all others by memory."""

    DENSE_PRODUCT = "dense product"
    GROUPED_PRODUCT = "grouped product"
    ATTENTION = "attention"
    MEMORY = "memory-bound"


@dataclass(frozen=True, slots=True, order=True)
class Operation:
    """An operation on one rank: its kind, the dtype of its result, FLOPs, bytes read and written.

    An operation without a result has the dtype of its first tensor.
    """

    kind: OperationKind
    dtype: str
    flops: int
    bytes_read: int
    bytes_written: int


class OperationRecorder:
    """Counts equal operations; an ``OperationObserver`` of a ``SimulatedRank``."""

    def __init__(self) -> None:
        self.counts: Counter[Operation] = Counter()

    def __call__(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, /
    ) -> None:
        if not is_view(func):
            kind, flops = _products(func, args, out)
            given, result = tensors_in((*args, *kwargs.values())), tensors_in((out,))
            dtype = str((*result, *given)[0].dtype).removeprefix("torch.") if given else ""
            self.counts[Operation(kind, dtype, flops, _bytes(given), _bytes(result))] += 1


@cache
def _flop_counter() -> Any:
    """Return PyTorch's counter of FLOPs: imported when used, since it brings Triton in."""
    return importlib.import_module("torch.utils.flop_counter")


def _products(func: Any, args: tuple[Any, ...], out: Any) -> tuple[OperationKind, int]:
    name, packet = func._opname, func.overloadpacket
    if name == "grouped_products":
        return OperationKind.GROUPED_PRODUCT, args[1]
    if name.startswith("_scaled_dot_product_"):
        return OperationKind.ATTENTION, _attention_flops(name, args)
    counted = _flop_counter().flop_registry.get(_IN_PLACE.get(packet, packet))
    if counted is not None:
        return OperationKind.DENSE_PRODUCT, int(counted(*args, out_val=out))
    return OperationKind.MEMORY, 0


def _attention_flops(name: str, args: tuple[Any, ...]) -> int:
    backward = "backward" in name
    grad, tensors = args[0].shape, [a.shape for a in args[: 3 + backward]]
    counter = _flop_counter()
    if backward:
        flops = counter.sdpa_backward_flop_count(grad, *tensors[1:])
    else:
        flops = counter.sdpa_flop_count(*tensors)
    query, key = tensors[backward][-2], tensors[backward + 1][-2]
    causal = query == key and any(isinstance(a, bool) and a for a in args[3 + backward :])
    return flops // 2 if causal else flops


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
