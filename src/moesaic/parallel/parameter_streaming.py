"""Parameter streaming: the weights of blocks on a memory tier, fetched for each unit that computes.

A unit is the experts of an MoE layer, or all other parameters of a block. Its weights are on the
device from its forward to the end of it, and again in its backward; those of the unit that computes
next are fetched meanwhile. Forward fetches all experts of a layer, since it begins before the
tokens are routed; backward those alone that had rows. The last block of a stage stays after its
forward pass until another block is used: if backward of that stage comes next, it has it. What ZeRO
shards stays, and is gathered from peers: dense slices from peers and experts from a slower tier are
the two dimensions of SE-MoE's prefetch (2205.10034). Parameters outside of blocks (embeddings, the
last norm) stay as well.

Between uses a parameter is a view of the tier's memory, so optimizers and checkpoints read and
write it there. In use it is a buffer on the device whose memory is released afterwards; views that
autograd saved of it are valid again once it is refilled.
"""

from collections.abc import Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.autograd import Variable

from moesaic.core.shapes import Int, Tensor
from moesaic.distributed.world import is_dtensor
from moesaic.memory.tensor_store import Access, FetchedTensors, Part, TensorStore, rows_of
from moesaic.model.block import Block, BlockState
from moesaic.moe.experts import GroupedExperts
from moesaic.moe.layer import MoELayer, MoEOutput
from moesaic.parallel.partial_forward import BlockRange


@dataclass(eq=False, slots=True)
class StreamedUnit:
    """Weights of a block or MoE layer: ``resting`` in the tier, ``buffers`` on the device in use.

    ``names`` are theirs in ``module``, whose name ``prefix`` ends with a dot.
    ``missing_gradients`` counts the parameters whose gradient the present backward has not added.
    ``present`` are the parts in the buffers, all else there is zero.
    """

    module: Block | MoELayer
    prefix: str
    names: tuple[str, ...]
    resting: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    in_use: bool = False
    missing_gradients: int = 0
    present: list[Part] = field(default_factory=list)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters by their name in the model."""
        return {f"{self.prefix}{name}": self.module.get_parameter(name) for name in self.names}

    @property
    def num_bytes(self) -> int:
        """The bytes of all parameters."""
        return sum(parameter.nbytes for parameter in self.parameters.values())

    def is_in(self, other: "StreamedUnit") -> bool:
        """Whether it is the other one, or the experts in its block."""
        return self.prefix.startswith(other.prefix)

    def allocate(self, parts: list[Part]) -> list[Tensor]:
        """Allocate the buffers, zero where they get none of the parts; return what parts get."""
        for name, buffer in self.buffers.items():
            buffer.untyped_storage().resize_(buffer.numel() * buffer.itemsize)
            if Part(name) not in parts:
                buffer.zero_()
        return [rows_of(self.buffers[part.name], part) for part in parts]

    def free_buffers(self) -> None:
        """Release the buffers' memory."""
        for buffer in self.buffers.values():
            buffer.untyped_storage().resize_(0)

    def parts(self, used: "Sequence[UsedExperts]") -> list[Part]:
        """Return what a pass needs: the experts that its calls used; without calls, all."""
        if not used:
            return [Part(name) for name in self.parameters]
        counts = [each.counts() for each in used]
        runs = _runs([sum(rows) for rows in zip(*counts, strict=True)])
        return [Part(name, start, stop) for name in self.parameters for start, stop in runs]


@dataclass(frozen=True, slots=True)
class _Coming:
    """Parts of a unit on their way; ``copied`` is the copy into its buffers, on a thread."""

    unit: StreamedUnit
    parts: list[Part]
    fetched: FetchedTensors
    copied: "Future[None] | None"

    def finish(self) -> None:
        """Have them in the buffers."""
        if self.copied is None:
            self.fetched.wait()
            self.fetched.release()
        else:
            self.copied.result()


class UsedExperts:
    """How many rows each expert of a layer had in a call, copied to the host without a wait."""

    def __init__(self, rows_per_expert: Int[Tensor, "E"]) -> None:
        on_gpu = rows_per_expert.is_cuda
        host = torch.empty(rows_per_expert.shape, dtype=rows_per_expert.dtype, pin_memory=on_gpu)
        self._host = host.copy_(rows_per_expert, non_blocking=True)
        self._arrived = torch.cuda.current_stream().record_event() if on_gpu else None

    def counts(self) -> list[int]:
        """Return the rows of each expert."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()


UsedByUnit = dict[StreamedUnit, list[UsedExperts]]  # in the calls of one forward pass


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Return the runs of experts with rows, as pairs of the first and the one after the last."""
    used = [0, *(int(count > 0) for count in rows), 0]
    changes = [number for number in range(len(rows) + 1) if used[number] != used[number + 1]]
    return list(zip(changes[::2], changes[1::2], strict=True))


def _units(model: nn.Module, *, experts: Set[str]) -> Iterator[StreamedUnit]:
    """Yield each block, without what ZeRO shards, and then the ``experts`` in it."""
    for path, module in model.named_modules():
        if not isinstance(module, Block | MoELayer):
            continue
        prefix, is_block = f"{path}." if path else "", isinstance(module, Block)
        names = tuple(
            name
            for name, parameter in module.named_parameters()
            if (f"{prefix}{name}" in experts) != is_block
            and not (is_block and is_dtensor(parameter))
        )
        if names:
            yield StreamedUnit(module, prefix, names)


def _backward_order(units: Sequence[StreamedUnit]) -> list[StreamedUnit]:
    """Return the units as backward reaches them: the last block first, each before its experts."""
    found: list[StreamedUnit] = []
    for unit in reversed(units):
        inner = [each for each in found if each.is_in(unit)]
        found[len(found) - len(inner) :] = [unit, *inner]
    return found


class ParameterStream:
    """Streams the weights of a model's blocks from ``store`` (see the module's docstring).

    ``experts`` names the parameters in units of their own: those with a slice for each expert;
    ``stages`` are the blocks of the rank's stages of a pipeline: a pass is through one of them.
    At most three units are on the device: a block's two, and the one that is fetched.
    ``device_bytes`` counts them, ``peak_device_bytes`` is the most there has been.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        store: TensorStore,
        experts: Set[str],
        stages: Sequence[BlockRange],
    ) -> None:
        self.store = store
        self._units = list(_units(model, experts=experts))
        chains = [[u for u in self._units if stage.holds(u.prefix)] for stage in stages]
        self._first, self._last = ({c[end] for c in chains if c} for end in (0, -1))
        self._used: UsedByUnit = {}  # by the forward pass that runs
        self._used_before: UsedByUnit = {}  # by that whose backward pass runs; none: unknown
        self.device_bytes, self.peak_device_bytes = 0, 0
        self._coming: _Coming | None = None
        self._hooked: set[nn.Parameter] = set()
        # a GPU copies beside its other work; on a CPU a thread does
        self._thread = None if store.copies else ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._next: tuple[dict[StreamedUnit, StreamedUnit], ...] = {}, {}  # forward, backward
        for chain in chains:
            self._next[False].update(pairwise(chain))
            self._next[True].update(pairwise(_backward_order(chain)))
        for unit in self._units:
            self._add_hooks(unit)

    @property
    def names(self) -> list[str]:
        """The names of all parameters that are streamed."""
        return [name for unit in self._units for name in unit.parameters]

    @property
    def in_use(self) -> frozenset[nn.Parameter]:
        """The parameters that are on the device."""
        used = (unit for unit in self._units if unit.in_use)
        return frozenset(p for unit in used for p in unit.parameters.values())

    def resting(self, name: str) -> Tensor:
        """Return a parameter's memory of the tier."""
        return next(unit.resting[name] for unit in self._units if name in unit.resting)

    def memory(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return memory of the tier for a parameter: zeros."""
        if name not in self.store.specs:
            self.store.allocate(name, shape, dtype)
        return self.store.live(name)

    @torch.no_grad()
    def move_to_tier(self) -> None:
        """Move all parameters that are not yet there to the tier."""
        for unit in self._units:
            for name, parameter in unit.parameters.items():
                self._move(unit, name, parameter)

    def _move(self, unit: StreamedUnit, name: str, parameter: nn.Parameter) -> None:
        known = unit.resting.get(name)
        if known is not None and known.data_ptr() == parameter.data_ptr():
            return
        resting = self.memory(name, parameter.shape, parameter.dtype)
        if resting.data_ptr() != parameter.data_ptr():
            resting.copy_(parameter)
            parameter.data = resting
        buffer = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.store.device)
        buffer.untyped_storage().resize_(0)
        unit.resting[name], unit.buffers[name] = resting, buffer
        if parameter.requires_grad and parameter not in self._hooked:
            self._hooked.add(parameter)
            parameter.register_post_accumulate_grad_hook(lambda _: self._count_gradient(unit))

    def _add_hooks(self, unit: StreamedUnit) -> None:
        stays = any(last.is_in(unit) for last in self._last)  # until another block is used

        def before(*_: Any) -> None:
            if not in_backward():
                self._used = {} if unit in self._first else self._used
            self._use(unit)

        def note(rows_per_expert: Int[Tensor, "E"]) -> None:
            if not in_backward():
                self._used.setdefault(unit, []).append(UsedExperts(rows_per_expert))

        def after(_module: nn.Module, _inputs: Any, output: MoEOutput | BlockState) -> None:
            if in_backward():  # recomputed: the backward of the unit comes next
                return
            out = output.out if isinstance(output, MoEOutput) else output.x
            if out.requires_grad:
                used = self._used
                out.register_hook(lambda _: self._start_backward(unit, used))
            if not (stays and out.requires_grad):
                self._release(unit)

        unit.module.register_forward_pre_hook(before)
        unit.module.register_forward_hook(after)
        if isinstance(unit.module, MoELayer) and type(unit.module.experts) is GroupedExperts:
            unit.module.experts.call_before_use(note)

    def _start_backward(self, unit: StreamedUnit, used: UsedByUnit) -> None:
        unit.missing_gradients = len(unit.names)  # frozen ones have none: then it stays longer
        self._used_before = used
        self._use(unit)
        Variable._execution_engine.queue_callback(self._end_backward)

    def _count_gradient(self, unit: StreamedUnit) -> None:
        unit.missing_gradients -= 1
        if unit.missing_gradients == 0:
            self._release(unit)

    def _end_backward(self) -> None:
        """Release what no gradient has reached, and what was fetched in vain."""
        self._discard()
        self._used_before = {}
        for unit in self._units:
            self._release(unit)

    @torch.no_grad()
    def _use(self, unit: StreamedUnit) -> None:
        """Have a unit's weights on the device, none of other blocks, and fetch the next unit's.

        What is left of others is frozen or waits in a pipeline, or its pass was interrupted.
        """
        for other in self._units:
            if other.in_use and not (other.is_in(unit) or unit.is_in(other)):
                self._release(other)
        parts = self._parts(unit)
        if unit.present != parts and unit.present != unit.parts(()):
            self._release(unit)  # what an interrupted backward has left
        if not unit.in_use:
            for name, parameter in unit.parameters.items():
                self._move(unit, name, parameter)
            self._fill(unit, parts)
        following = self._next[in_backward()].get(unit)
        if following is not None and not following.in_use:
            self._prefetch(following, self._parts(following))

    def _parts(self, unit: StreamedUnit) -> list[Part]:
        return unit.parts(self._used_before.get(unit, ()) if in_backward() else ())

    def _fill(self, unit: StreamedUnit, parts: list[Part]) -> None:
        self._prefetch(unit, parts)
        coming, self._coming = self._coming, None
        assert coming is not None
        coming.finish()
        for name, parameter in unit.parameters.items():
            parameter.data = unit.buffers[name]
        unit.in_use, unit.present = True, parts

    @torch.no_grad()
    def _copy(self, unit: StreamedUnit, parts: list[Part], fetched: FetchedTensors) -> None:
        targets = unit.allocate(parts)
        for tensor, target in zip(fetched.wait(), targets, strict=True):
            target.copy_(tensor)
        fetched.release()

    def _prefetch(self, unit: StreamedUnit, parts: list[Part]) -> None:
        coming = self._coming
        if coming is not None and (coming.unit, coming.parts) != (unit, parts):
            self._discard()
        if self._coming is None and unit.resting:
            into = None if self._thread else unit.allocate(parts)
            fetched = self.store.fetch(parts, access=Access.READ, into=into)
            copied = self._thread and self._thread.submit(self._copy, unit, parts, fetched)
            self._coming = _Coming(unit, parts, fetched, copied)
            self._count_bytes(unit.num_bytes)

    def _discard(self) -> None:
        if self._coming is not None:
            coming, self._coming = self._coming, None
            coming.finish()
            coming.unit.free_buffers()
            self._count_bytes(-coming.unit.num_bytes)

    def _count_bytes(self, change: int) -> None:
        self.device_bytes += change
        self.peak_device_bytes = max(self.peak_device_bytes, self.device_bytes)

    def _release(self, unit: StreamedUnit) -> None:
        if not unit.in_use:
            return
        for name, parameter in unit.parameters.items():
            parameter.data = unit.resting[name]
        unit.free_buffers()
        unit.in_use, unit.present = False, []
        self._count_bytes(-unit.num_bytes)


def in_backward() -> bool:
    """Whether this thread runs a backward pass, also where that repeats a forward pass."""
    return torch._C._current_graph_task_id() != -1
