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
from moesaic.dist.collectives import Group

NAMESPACES = ("c10d", "_c10d_functional")
_IN = ("input", "inputs", "input_tensor", "input_tensors", "input_list", "tensors", "tensor")


@dataclass(frozen=True, slots=True)
class Sent:
    """Bytes that went to the global rank ``to`` over an axis, and how they were moved."""

    kind: str
    axis: str
    to: int
    bytes: int


class Wire(TorchDispatchMode):
    """While it is entered, counts what this rank sends.

    ``axes`` names groups; others go by their description (an axis of a DeviceMesh by its name).
    Counts stay after leaving, and entering again adds to them.
    """

    def __init__(self, *, axes: Mapping[str, Group] | None = None) -> None:
        super().__init__()
        named = (axes or {}).items()
        self._names = {group.group_name: name for name, group in named if group is not None}
        self._bytes: Counter[tuple[str, str, int]] = Counter()
        self._calls: Counter[str] = Counter()

    def sent(self) -> list[Sent]:
        """Return what was sent so far, sorted."""
        return [Sent(*key, size) for key, size in sorted(self._bytes.items()) if size]

    def total(self, *, kind: str | None = None, axis: str | None = None) -> int:
        """Return the bytes sent, of one kind or over one axis if it is named."""
        return sum(
            line.bytes
            for line in self.sent()
            if kind in (None, line.kind) and axis in (None, line.axis)
        )

    def calls(self, kind: str) -> int:
        """Return how many collectives of a kind were called."""
        return self._calls[kind]

    def leaving(self, *, ranks_per_node: int) -> int:
        """Return the bytes sent to other nodes, where consecutive ranks share a node."""
        node = distributed.get_rank() // ranks_per_node
        return sum(line.bytes for line in self.sent() if line.to // ranks_per_node != node)

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
        kind = _kind(func._opname)
        if kind is None:
            return
        names = [argument.name for argument in func._schema.arguments]
        call = dict(zip(names, args, strict=False)) | kwargs
        group = _group(call)
        axis = self._names.get(group.group_name) or _described(group)
        ranks = distributed.get_process_group_ranks(group)
        self._calls[kind] += 1
        for place, size in KINDS[kind](call, group):
            if place != group.rank():
                self._bytes[kind, axis, ranks[place]] += size


def _kind(name: str) -> str | None:
    plain = name.replace("_", "")
    return next((kind for kind in KINDS if plain.startswith(kind.replace("-", ""))), None)


def _group(call: Mapping[str, Any]) -> distributed.ProcessGroup:
    given = call["process_group"] if "process_group" in call else call["group_name"]
    if isinstance(given, str):
        return _by_name(given)
    if isinstance(given, distributed.ProcessGroup):
        return given
    return distributed.ProcessGroup.unbox(given)


def _by_name(name: Any) -> distributed.ProcessGroup:
    return distributed.distributed_c10d._resolve_process_group(name)  # pyright: ignore[reportPrivateImportUsage]


def _described(group: distributed.ProcessGroup) -> str:
    desc = group.group_desc
    return group.group_name if desc in ("", "undefined") else desc.removeprefix("mesh_")


def _size(value: Any) -> int:
    """Bytes of a tensor or of lists of tensors."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_size(each) for each in value)


def _given(call: Mapping[str, Any]) -> Any:
    return next(call[name] for name in _IN if name in call)


def _to_each(call: Mapping[str, Any], group: Any) -> Iterator[tuple[int, int]]:
    """An all-to-all: block r goes to rank r."""
    given = _given(call)
    if not isinstance(given, torch.Tensor):
        yield from ((place, _size(block)) for place, block in enumerate(given))
        return
    rows = call.get("input_split_sizes") or [_even(given, group)] * group.size()
    row = _size(given) // max(given.shape[0], 1)
    yield from ((place, int(count) * row) for place, count in enumerate(rows))


def _even(given: Tensor, group: Any) -> int:
    return given.shape[0] // group.size()


def _around(times: Callable[[int, int], int]) -> Callable[..., Iterator[tuple[int, int]]]:
    """A ring: everything goes to the next rank; ``times(bytes, ranks)`` says how much it is."""

    def sent(call: Mapping[str, Any], group: Any) -> Iterator[tuple[int, int]]:
        ranks = group.size()
        yield (group.rank() + 1) % ranks, times(_size(_given(call)), ranks)

    return sent


def _scattered(call: Mapping[str, Any], group: Any) -> Iterator[tuple[int, int]]:
    """A ring that sums: all blocks pass but this rank's own, which ends here."""
    given, ranks = _given(call), group.size()
    blocks = given[0] if call.get("input_tensors") is not None else None
    own = _size(blocks[group.rank()]) if blocks is not None else _size(given) // ranks
    yield (group.rank() + 1) % ranks, _size(given) - own


def _from_root(call: Mapping[str, Any], group: Any) -> Iterator[tuple[int, int]]:
    """One rank sends the same to every other."""
    if group.rank() == call.get("root_rank", call.get("src")):
        yield from ((place, _size(_given(call))) for place in range(group.size()))


def _to_root(call: Mapping[str, Any], group: Any) -> Iterator[tuple[int, int]]:  # noqa: ARG001
    """Every rank sends its own to one."""
    yield call["root_rank"], _size(_given(call))


def _blocks_from_root(call: Mapping[str, Any], group: Any) -> Iterator[tuple[int, int]]:
    """One rank sends to every other a block of its own."""
    if group.rank() == call["root_rank"]:
        yield from ((place, _size(block)) for place, block in enumerate(call["input_tensors"][0]))


def _to_one(call: Mapping[str, Any], group: Any) -> Iterator[tuple[int, int]]:  # noqa: ARG001
    """A message."""
    yield call["dst"], _size(_given(call))


def _messages(call: Mapping[str, Any], group: Any) -> Iterator[tuple[int, int]]:  # noqa: ARG001
    """Several messages at once; what comes is in the list as well."""
    every = zip(call["op_list"], call["peer_list"], call["tensors"], strict=True)
    yield from ((peer, _size(tensor)) for op, peer, tensor in every if op == "isend")


KINDS: dict[str, Callable[[Mapping[str, Any], Any], Iterator[tuple[int, int]]]] = {
    "all-to-all": _to_each,
    "all-gather": _around(lambda size, ranks: size * (ranks - 1)),
    "reduce-scatter": _scattered,
    "all-reduce": _around(lambda size, ranks: 2 * size * (ranks - 1) // ranks),
    "reduce": _to_root,
    "broadcast": _from_root,
    "gather": _to_root,
    "scatter": _blocks_from_root,
    "send": _to_one,
    "isend": _to_one,
    "batch-p2p": _messages,
}
