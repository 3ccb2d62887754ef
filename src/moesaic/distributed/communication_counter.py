"""Communication counter: the bytes that this rank's collectives send, by kind, axis and receiver.

It counts every collective of torch, also those of FSDP2 and DTensor, in forward and backward, and
under fake tensors in a fake process group, where nothing is sent. Counted is what a rank has to
send where no link carries a byte twice: an all-to-all sends each block to its owner; all-gather,
reduce-scatter and all-reduce are rings, in which each rank sends to the next of its group. A rank's
own block is not sent.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as distributed
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic.core.shapes import Tensor
from moesaic.distributed.process_groups import Group
from moesaic.distributed.world import is_dtensor_type

NAMESPACES = ("c10d", "_c10d_functional")
# (arguments of a collective, its group) -> pairs of (rank in the group, bytes sent to it)
_BlocksSent = Callable[[Mapping[str, Any], Any], Iterator[tuple[int, int]]]
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
    """Bytes of ``dtype`` sent to the global rank ``destination`` over an axis, by kind of call."""

    kind: str
    axis: str
    dtype: str
    destination: int
    bytes: int


@dataclass(frozen=True, slots=True)
class SentCall:
    """A call of a collective: the bytes of its input, and those that this rank sends."""

    kind: str
    axis: str
    input_bytes: int
    sent_bytes: int

    def over(self, ranks: int) -> "SentCall":
        """Return the same call over another number of ranks, of a kind whose input is the same."""
        return replace(self, sent_bytes=RING_BYTES[self.kind](self.input_bytes, ranks))


class CommunicationCounter(TorchDispatchMode):
    """Dispatch mode that counts what this rank sends while it is entered.

    ``axes`` names groups, and all with the same ranks (those of gradient sums); other groups have
    their description as name (a DeviceMesh's axis name).
    Counts remain after exit, and entering again adds to them.
    """

    def __init__(self, *, axes: Mapping[str, Group] | None = None) -> None:
        super().__init__()
        named = (axes or {}).items()
        self._names = {
            tuple(distributed.get_process_group_ranks(group)): name
            for name, group in named
            if group is not None
        }
        self._bytes: Counter[tuple[str, str, str, int]] = Counter()
        self._calls: Counter[SentCall] = Counter()

    def entries(self) -> list[SentBytes]:
        """Return all counts so far, sorted."""
        return [SentBytes(*key, size) for key, size in sorted(self._bytes.items()) if size]

    def total_bytes(
        self, *, kind: str | None = None, axis: str | None = None, dtype: torch.dtype | None = None
    ) -> int:
        """Return the bytes sent, of one kind, axis or dtype if named."""
        return sum(
            line.bytes
            for line in self.entries()
            if kind in (None, line.kind)
            and axis in (None, line.axis)
            and (dtype is None or line.dtype == str(dtype))
        )

    def num_calls(self, kind: str) -> int:
        """Return the number of calls of a kind."""
        return sum(number for call, number in self._calls.items() if call.kind == kind)

    def calls(self) -> "Counter[SentCall]":
        """Return how often each call was made so far."""
        return Counter(self._calls)

    def inter_node_bytes(self, *, ranks_per_node: int, dtype: torch.dtype | None = None) -> int:
        """Return the bytes sent to other nodes of ``ranks_per_node`` consecutive ranks."""
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
        if any(map(is_dtensor_type, types)):
            return NotImplemented  # its local tensors arrive here one by one
        out = func(*args, **(kwargs or {}))
        self.count(func, args, kwargs or {})
        return out

    def count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count an operation if it is a collective."""
        kind = _collective_kind(func._opname) if func.namespace in NAMESPACES else None
        if kind is None:
            return
        names = [argument.name for argument in func._schema.arguments]
        call = dict(zip(names, args, strict=False)) | kwargs
        group = _call_group(call)
        ranks = distributed.get_process_group_ranks(group)
        given, sent = _input_of(call), 0
        axis = self._names.get(tuple(ranks)) or _axis_name(group)
        for place, size in BLOCKS_SENT[kind](call, group):
            if place != group.rank():
                sent += size
                self._bytes[kind, axis, str(_first_tensor(given).dtype), ranks[place]] += size
        self._calls[SentCall(kind, axis, _num_bytes(given), sent)] += 1


def _collective_kind(name: str) -> str | None:
    plain = name.replace("_", "")
    return next((kind for kind in BLOCKS_SENT if plain.startswith(kind.replace("-", ""))), None)


def _call_group(call: Mapping[str, Any]) -> distributed.ProcessGroup:
    group = call["process_group"] if "process_group" in call else call["group_name"]
    if isinstance(group, str):
        resolve: Any = distributed.distributed_c10d._resolve_process_group  # pyright: ignore[reportPrivateImportUsage]
        return resolve(group)
    if isinstance(group, distributed.ProcessGroup):
        return group
    return distributed.ProcessGroup.unbox(group)


def _axis_name(group: distributed.ProcessGroup) -> str:
    desc = group.group_desc
    return group.group_name if desc in ("", "undefined") else desc.removeprefix("mesh_")


def _num_bytes(value: Any) -> int:
    """Return the bytes of a tensor or of nested lists of tensors."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_num_bytes(each) for each in value)


def _input_of(call: Mapping[str, Any]) -> Any:
    return next(call[name] for name in _INPUT_NAMES if name in call)


def _first_tensor(value: Any) -> Tensor:
    return value if isinstance(value, torch.Tensor) else _first_tensor(value[0])


def _all_to_all_blocks(call: Mapping[str, Any], group: Any) -> Iterator[tuple[int, int]]:
    """All-to-all: block r goes to rank r."""
    tensors = _input_of(call)
    if not isinstance(tensors, torch.Tensor):
        yield from ((place, _num_bytes(block)) for place, block in enumerate(tensors))
        return
    rows = call.get("input_split_sizes") or [tensors.shape[0] // group.size()] * group.size()
    row = _num_bytes(tensors) // max(tensors.shape[0], 1)
    yield from ((place, int(count) * row) for place, count in enumerate(rows))


def _ring(volume: Callable[[int, int], int]) -> _BlocksSent:
    """Ring: ``volume(bytes, ranks)`` bytes go to the next rank."""

    def blocks(call: Mapping[str, Any], group: Any) -> Iterator[tuple[int, int]]:
        ranks = group.size()
        yield (group.rank() + 1) % ranks, volume(_num_bytes(_input_of(call)), ranks)

    return blocks


def _reduce_scatter_blocks(call: Mapping[str, Any], group: Any) -> Iterator[tuple[int, int]]:
    """Ring reduce-scatter: all blocks but this rank's own go to the next rank."""
    tensors, ranks = _input_of(call), group.size()
    blocks = tensors[0] if call.get("input_tensors") is not None else None
    own = _num_bytes(blocks[group.rank()]) if blocks is not None else _num_bytes(tensors) // ranks
    yield (group.rank() + 1) % ranks, _num_bytes(tensors) - own


def _broadcast_blocks(call: Mapping[str, Any], group: Any) -> Iterator[tuple[int, int]]:
    """Broadcast: one rank sends the same to every other."""
    if group.rank() == call.get("root_rank", call.get("src")):
        yield from ((place, _num_bytes(_input_of(call))) for place in range(group.size()))


def _to_rank(argument: str) -> _BlocksSent:
    """Everything goes to the rank that an argument of the call names."""
    return lambda call, _: iter([(call[argument], _num_bytes(_input_of(call)))])


def _scatter_blocks(call: Mapping[str, Any], group: Any) -> Iterator[tuple[int, int]]:
    """Scatter: one rank sends a block to every other."""
    if group.rank() == call["root_rank"]:
        yield from (
            (place, _num_bytes(block)) for place, block in enumerate(call["input_tensors"][0])
        )


def _batch_p2p_blocks(call: Mapping[str, Any], group: Any) -> Iterator[tuple[int, int]]:  # noqa: ARG001
    """Batched point-to-point calls; the list holds receives too."""
    every = zip(call["op_list"], call["peer_list"], call["tensors"], strict=True)
    yield from ((peer, _num_bytes(tensor)) for op, peer, tensor in every if op == "isend")


# (bytes of the input, ranks) -> bytes sent, where the input does not depend on the ranks
RING_BYTES: dict[str, Callable[[int, int], int]] = {
    "all-gather": lambda size, ranks: size * (ranks - 1),
    "all-reduce": lambda size, ranks: 2 * size * (ranks - 1) // ranks,
}
BLOCKS_SENT: dict[str, _BlocksSent] = {
    "all-to-all": _all_to_all_blocks,
    "all-gather": _ring(RING_BYTES["all-gather"]),
    "reduce-scatter": _reduce_scatter_blocks,
    "all-reduce": _ring(RING_BYTES["all-reduce"]),
    "reduce": _to_rank("root_rank"),
    "broadcast": _broadcast_blocks,
    "gather": _to_rank("root_rank"),
    "scatter": _scatter_blocks,
    "send": _to_rank("dst"),
    "isend": _to_rank("dst"),
    "batch-p2p": _batch_p2p_blocks,
}
