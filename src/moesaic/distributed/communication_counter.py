"""Wire: counts the bytes that this rank's collectives send, by kind, axis and receiver.

It sees every collective of torch, whoever calls it: ours, FSDP2's, DTensor's; the backward pass
included, and under fake tensors in a fake process group, where nothing is sent at all. What is
counted is what a rank has to send where no link carries a byte twice: an all-to-all sends each
block to its owner, and gathers, scatters and sums go around a ring, each rank sending to the next
of its group. A rank's own block is not sent.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as distributed
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic.core.shapes import Tensor
from moesaic.distributed.process_groups import Group

NAMESPACES = ("c10d", "_c10d_functional")
_INPUT_NAMES = (
    "input",
    "inputs",
    "input_tensor",
    "input_tensors",
    "input_list",
    "tensors",
    "tensor",
)


@dataclass(frozen=True, slots=True)
class SentBytes:
    """Bytes of ``dtype`` that went to the global rank ``to`` over an axis, and how."""

    kind: str
    axis: str
    dtype: str
    destination: int
    bytes: int


class CommunicationCounter(TorchDispatchMode):
    """While it is entered, counts what this rank sends.

    ``axes`` names groups; others go by their description (an axis of a DeviceMesh by its name).
    Counts stay after leaving, and entering again adds to them.
    """

    def __init__(self, *, axes: Mapping[str, Group] | None = None) -> None:
        super().__init__()
        named = (axes or {}).items()
        self._names = {group.group_name: name for name, group in named if group is not None}
        self._bytes: Counter[tuple[str, str, str, int]] = Counter()
        self._calls: Counter[str] = Counter()

    def entries(self) -> list[SentBytes]:
        """Return what was sent so far, sorted."""
        return [SentBytes(*key, size) for key, size in sorted(self._bytes.items()) if size]

    def total_bytes(
        self, *, kind: str | None = None, axis: str | None = None, dtype: torch.dtype | None = None
    ) -> int:
        """Return the bytes sent: of one kind, over one axis or of one dtype if it is named."""
        return sum(
            line.bytes
            for line in self.entries()
            if kind in (None, line.kind)
            and axis in (None, line.axis)
            and (dtype is None or line.dtype == str(dtype))
        )

    def num_calls(self, kind: str) -> int:
        """Return how many collectives of a kind were called."""
        return self._calls[kind]

    def inter_node_bytes(self, *, ranks_per_node: int, dtype: torch.dtype | None = None) -> int:
        """Return the bytes sent to other nodes, where consecutive ranks share a node."""
        node = distributed.get_rank() // ranks_per_node
        return sum(
            line.bytes
            for line in self.entries()
            if line.destination // ranks_per_node != node
            and (dtype is None or line.dtype == str(dtype))
        )

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        dtensor = sys.modules.get("torch.distributed.tensor")  # unused while nobody imported it
        if dtensor is not None and any(issubclass(kind, dtensor.DTensor) for kind in types):
            return NotImplemented  # what it consists of comes here one by one
        out = func(*args, **(kwargs or {}))
        if func.namespace in NAMESPACES:
            self._count(func, args, kwargs or {})
        return out

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kind = _collective_kind(func._opname)
        if kind is None:
            return
        names = [argument.name for argument in func._schema.arguments]
        call = dict(zip(names, args, strict=False)) | kwargs
        group = _call_group(call)
        axis = self._names.get(group.group_name) or _axis_name(group)
        ranks = distributed.get_process_group_ranks(group)
        self._calls[kind] += 1
        for place, size in BLOCKS_SENT[kind](call, group):
            if place != group.rank():
                dtype = str(_first_tensor(_input_of(call)).dtype)
                self._bytes[kind, axis, dtype, ranks[place]] += size


def _collective_kind(name: str) -> str | None:
    plain = name.replace("_", "")
    return next((kind for kind in BLOCKS_SENT if plain.startswith(kind.replace("-", ""))), None)


def _call_group(call: Mapping[str, Any]) -> distributed.ProcessGroup:
    given = call["process_group"] if "process_group" in call else call["group_name"]
    if isinstance(given, str):
        return _resolve_group(given)
    if isinstance(given, distributed.ProcessGroup):
        return given
    return distributed.ProcessGroup.unbox(given)


def _resolve_group(name: Any) -> distributed.ProcessGroup:
    return distributed.distributed_c10d._resolve_process_group(name)  # pyright: ignore[reportPrivateImportUsage]


def _axis_name(group: distributed.ProcessGroup) -> str:
    desc = group.group_desc
    return group.group_name if desc in ("", "undefined") else desc.removeprefix("mesh_")


def _num_bytes(value: Any) -> int:
    """Bytes of a tensor or of lists of tensors."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_num_bytes(each) for each in value)


def _input_of(call: Mapping[str, Any]) -> Any:
    return next(call[name] for name in _INPUT_NAMES if name in call)


def _first_tensor(value: Any) -> Tensor:
    return value if isinstance(value, torch.Tensor) else _first_tensor(value[0])


def _all_to_all_blocks(call: Mapping[str, Any], group: Any) -> Iterator[tuple[int, int]]:
    """An all-to-all: block r goes to rank r."""
    given = _input_of(call)
    if not isinstance(given, torch.Tensor):
        yield from ((place, _num_bytes(block)) for place, block in enumerate(given))
        return
    rows = call.get("input_split_sizes") or [_even_split(given, group)] * group.size()
    row = _num_bytes(given) // max(given.shape[0], 1)
    yield from ((place, int(count) * row) for place, count in enumerate(rows))


def _even_split(given: Tensor, group: Any) -> int:
    return given.shape[0] // group.size()


def _ring_blocks(times: Callable[[int, int], int]) -> Callable[..., Iterator[tuple[int, int]]]:
    """A ring: everything goes to the next rank; ``times(bytes, ranks)`` says how much it is."""

    def sent(call: Mapping[str, Any], group: Any) -> Iterator[tuple[int, int]]:
        ranks = group.size()
        yield (group.rank() + 1) % ranks, times(_num_bytes(_input_of(call)), ranks)

    return sent


def _reduce_scatter_blocks(call: Mapping[str, Any], group: Any) -> Iterator[tuple[int, int]]:
    """A ring that sums: all blocks pass but this rank's own, which ends here."""
    given, ranks = _input_of(call), group.size()
    blocks = given[0] if call.get("input_tensors") is not None else None
    own = _num_bytes(blocks[group.rank()]) if blocks is not None else _num_bytes(given) // ranks
    yield (group.rank() + 1) % ranks, _num_bytes(given) - own


def _broadcast_blocks(call: Mapping[str, Any], group: Any) -> Iterator[tuple[int, int]]:
    """One rank sends the same to every other."""
    if group.rank() == call.get("root_rank", call.get("src")):
        yield from ((place, _num_bytes(_input_of(call))) for place in range(group.size()))


def _reduce_blocks(call: Mapping[str, Any], group: Any) -> Iterator[tuple[int, int]]:  # noqa: ARG001
    """Every rank sends its own to one."""
    yield call["root_rank"], _num_bytes(_input_of(call))


def _scatter_blocks(call: Mapping[str, Any], group: Any) -> Iterator[tuple[int, int]]:
    """One rank sends to every other a block of its own."""
    if group.rank() == call["root_rank"]:
        yield from (
            (place, _num_bytes(block)) for place, block in enumerate(call["input_tensors"][0])
        )


def _send_blocks(call: Mapping[str, Any], group: Any) -> Iterator[tuple[int, int]]:  # noqa: ARG001
    """A message."""
    yield call["dst"], _num_bytes(_input_of(call))


def _batch_p2p_blocks(call: Mapping[str, Any], group: Any) -> Iterator[tuple[int, int]]:  # noqa: ARG001
    """Several messages at once; what comes is in the list as well."""
    every = zip(call["op_list"], call["peer_list"], call["tensors"], strict=True)
    yield from ((peer, _num_bytes(tensor)) for op, peer, tensor in every if op == "isend")


BLOCKS_SENT: dict[str, Callable[[Mapping[str, Any], Any], Iterator[tuple[int, int]]]] = {
    "all-to-all": _all_to_all_blocks,
    "all-gather": _ring_blocks(lambda size, ranks: size * (ranks - 1)),
    "reduce-scatter": _reduce_scatter_blocks,
    "all-reduce": _ring_blocks(lambda size, ranks: 2 * size * (ranks - 1) // ranks),
    "reduce": _reduce_blocks,
    "broadcast": _broadcast_blocks,
    "gather": _reduce_blocks,
    "scatter": _scatter_blocks,
    "send": _send_blocks,
    "isend": _send_blocks,
    "batch-p2p": _batch_p2p_blocks,
}
