"""Parameter streaming: expert weights on a memory tier, fetched for each MoE layer that computes.

A layer's weights are on the device from its forward to the end of it, and again in its backward;
those of the layer that computes next are fetched meanwhile. Forward fetches all experts of a layer,
since it begins before the tokens are routed; backward those alone that had rows. Dense parameters
stay: ZeRO-3 shards them and gathers slices from peers, the other dimension of SE-MoE's prefetch
(2205.10034).

Between uses a parameter is a view of the tier's memory, so optimizers and checkpoints read and
write it there. In use it is a buffer on the device whose memory is released afterwards; views that
autograd saved of it are valid again once it is refilled.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd import Variable
from torch.distributed.tensor import DTensor

from moesaic.core.errors import ConfigError
from moesaic.core.shapes import Int, Tensor
from moesaic.memory.tensor_store import Access, FetchedTensors, Part, TensorStore, rows_of
from moesaic.moe.experts import GroupedExperts
from moesaic.moe.layer import MoELayer, MoEOutput
from moesaic.ops.permute import RowGroups


@dataclass(eq=False, slots=True)
class StreamedLayer:
    """The expert weights of a layer: ``resting`` in the tier, ``buffers`` on the device in use.

    ``missing_gradients`` counts the parameters whose gradient the present backward has not added.
    ``present`` are the parts in the buffers, all else there is zero. ``noted`` are the experts used
    by the forward pass that runs, None for all; ``waiting`` those of passes before their backward.
    """

    module: MoELayer
    prefix: str
    resting: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    in_use: bool = False
    missing_gradients: int = 0
    present: list[Part] = field(default_factory=list)
    noted: "list[UsedExperts] | None" = None
    waiting: "list[list[UsedExperts] | None]" = field(default_factory=list)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters by their name in the model."""
        found = self.module.experts.named_parameters()
        return {f"{self.prefix}{name}": parameter for name, parameter in found}

    @property
    def num_bytes(self) -> int:
        """The bytes of all parameters."""
        return sum(parameter.nbytes for parameter in self.parameters.values())

    def free_buffers(self) -> None:
        """Release the buffers' memory."""
        for buffer in self.buffers.values():
            buffer.untyped_storage().resize_(0)

    def parts(self, *, backward: bool) -> list[Part]:
        """Return what a pass needs: in backward, where it is known which forward pass it is of."""
        used = self.waiting[0] if backward and len(self.waiting) == 1 else None
        if used is None:
            return [Part(name) for name in self.parameters]
        counts = [each.counts() for each in used]
        runs = _runs([sum(rows) for rows in zip(*counts, strict=True)])
        return [Part(name, start, stop) for name in self.parameters for start, stop in runs]


@dataclass(frozen=True, slots=True)
class _Coming:
    """Parts of a layer on their way; ``copied`` is the copy into its buffers, on a thread."""

    layer: StreamedLayer
    parts: list[Part]
    fetched: FetchedTensors
    copied: "Future[None] | None"


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


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Return the runs of experts with rows, as pairs of the first and the one after the last."""
    used = [0, *(int(count > 0) for count in rows), 0]
    changes = [number for number in range(len(rows) + 1) if used[number] != used[number + 1]]
    return list(zip(changes[::2], changes[1::2], strict=True))


class ParameterStream:
    """Streams the expert weights of a model from ``store`` (see the module's docstring).

    At most two layers are on the device: the one that computes, and the one that is fetched.
    ``device_bytes`` counts both, ``peak_device_bytes`` is the most there has been.
    """

    def __init__(self, model: nn.Module, *, store: TensorStore) -> None:
        self.store = store
        self._layers = [
            StreamedLayer(module, f"{path}.experts." if path else "experts.")
            for path, module in model.named_modules()
            if isinstance(module, MoELayer)
        ]
        self.device_bytes, self.peak_device_bytes = 0, 0
        self._coming: _Coming | None = None
        self._hooked: set[nn.Parameter] = set()
        self._side = torch.cuda.Stream(store.device) if store.device.type == "cuda" else None
        # a GPU copies beside its other work; on a CPU a thread does
        self._thread = None if self._side else ThreadPoolExecutor(1, thread_name_prefix="stream")
        for number, layer in enumerate(self._layers):
            self._add_hooks(layer, number)

    @property
    def names(self) -> list[str]:
        """The names of all parameters that are streamed."""
        return [name for layer in self._layers for name in layer.parameters]

    @property
    def in_use(self) -> frozenset[nn.Parameter]:
        """The parameters that are on the device."""
        used = (layer for layer in self._layers if layer.in_use)
        return frozenset(p for layer in used for p in layer.parameters.values())

    def resting(self, name: str) -> Tensor:
        """Return a parameter's memory of the tier."""
        return next(layer.resting[name] for layer in self._layers if name in layer.resting)

    def memory(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return memory of the tier for a parameter: zeros."""
        if name not in self.store.specs:
            self.store.allocate(name, shape, dtype)
        return self.store.live(name)

    @torch.no_grad()
    def move_to_tier(self) -> None:
        """Move all parameters that are not yet there to the tier."""
        for layer in self._layers:
            for name, parameter in layer.parameters.items():
                self._move(layer, name, parameter)

    def _move(self, layer: StreamedLayer, name: str, parameter: nn.Parameter) -> None:
        known = layer.resting.get(name)
        if known is not None and known.data_ptr() == parameter.data_ptr():
            return
        if isinstance(parameter, DTensor):
            raise ConfigError(
                [
                    f"parallel.memory.parameters: ZeRO shards {name} over the ranks with copies of "
                    "its expert: set parallel.plan.expert so that there is one copy, or zero to 0"
                ]
            )
        resting = self.memory(name, parameter.shape, parameter.dtype)
        if resting.data_ptr() != parameter.data_ptr():
            resting.copy_(parameter)
            parameter.data = resting
        buffer = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.store.device)
        buffer.untyped_storage().resize_(0)
        layer.resting[name], layer.buffers[name] = resting, buffer
        if parameter.requires_grad and parameter not in self._hooked:
            self._hooked.add(parameter)
            parameter.register_post_accumulate_grad_hook(lambda _: self._count_gradient(layer))

    def _add_hooks(self, layer: StreamedLayer, number: int) -> None:
        last = number == len(self._layers) - 1

        def before(*_: Any) -> None:
            layer.noted = None
            self._use(number, then=number - 1 if _in_backward() else number + 1)

        def note(groups: RowGroups) -> None:
            if not _in_backward():
                layer.noted = [*(layer.noted or []), UsedExperts(groups.rows_per_expert)]

        def after(_module: nn.Module, _inputs: Any, output: MoEOutput) -> None:
            if _in_backward():  # recomputed: the backward of the layer comes next
                return
            if output.out.requires_grad:
                layer.waiting.append(layer.noted)
                output.out.register_hook(lambda _: self._start_backward(number))
            if not (last and torch.is_grad_enabled()):  # backward begins with the last one
                self._release(layer)

        layer.module.register_forward_pre_hook(before)
        layer.module.register_forward_hook(after)
        if type(experts := layer.module.experts) is GroupedExperts:
            experts.call_before_use(note)

    def _start_backward(self, number: int) -> None:
        layer = self._layers[number]
        layer.missing_gradients = sum(p.requires_grad for p in layer.parameters.values())
        self._use(number, then=number - 1)
        layer.waiting = layer.waiting[1:]
        Variable._execution_engine.queue_callback(self._end_backward)

    def _count_gradient(self, layer: StreamedLayer) -> None:
        layer.missing_gradients -= 1
        if layer.missing_gradients == 0:
            self._release(layer)

    def _end_backward(self) -> None:
        """Release what no gradient has reached, and what was fetched in vain."""
        self._discard()
        for layer in self._layers:
            self._release(layer)

    @torch.no_grad()
    def _use(self, number: int, *, then: int) -> None:
        """Have a layer's weights on the device, and fetch those of layer number ``then``."""
        layer = self._layers[number]
        parts = layer.parts(backward=_in_backward())
        if layer.present != parts and layer.present != layer.parts(backward=False):
            self._release(layer)  # what an interrupted backward has left
        if not layer.in_use:
            for name, parameter in layer.parameters.items():
                self._move(layer, name, parameter)
            self._fill(layer, parts)
        if 0 <= then < len(self._layers) and not self._layers[then].in_use:
            following = self._layers[then]
            self._prefetch(following, following.parts(backward=_in_backward()))

    def _fill(self, layer: StreamedLayer, parts: list[Part]) -> None:
        self._prefetch(layer, parts)
        coming, self._coming = self._coming, None
        assert coming is not None
        if coming.copied is None:
            self._copy(layer, parts, coming.fetched)
        else:
            coming.copied.result()
        for name, parameter in layer.parameters.items():
            parameter.data = layer.buffers[name]
        layer.in_use, layer.present = True, parts

    @torch.no_grad()
    def _copy(self, layer: StreamedLayer, parts: list[Part], fetched: FetchedTensors) -> None:
        for name, buffer in layer.buffers.items():
            buffer.untyped_storage().resize_(buffer.numel() * buffer.itemsize)
            if Part(name) not in parts:
                buffer.zero_()
        for tensor, part in zip(fetched.wait(), parts, strict=True):
            if self._side is not None:
                torch.cuda.current_stream().wait_stream(self._side)
                tensor.record_stream(torch.cuda.current_stream())
            rows_of(layer.buffers[part.name], part).copy_(tensor)
        fetched.release()

    def _prefetch(self, layer: StreamedLayer, parts: list[Part]) -> None:
        coming = self._coming
        if coming is not None and (coming.layer, coming.parts) != (layer, parts):
            self._discard()
        if self._coming is None and layer.resting:
            with torch.cuda.stream(self._side):
                fetched = self.store.fetch(parts, access=Access.READ)
            copied = self._thread and self._thread.submit(self._copy, layer, parts, fetched)
            self._coming = _Coming(layer, parts, fetched, copied)
            self._count_bytes(layer.num_bytes)

    def _discard(self) -> None:
        if self._coming is not None:
            coming, self._coming = self._coming, None
            coming.fetched.release() if coming.copied is None else coming.copied.result()
            coming.layer.free_buffers()
            self._count_bytes(-coming.layer.num_bytes)

    def _count_bytes(self, change: int) -> None:
        self.device_bytes += change
        self.peak_device_bytes = max(self.peak_device_bytes, self.device_bytes)

    def _release(self, layer: StreamedLayer) -> None:
        if not layer.in_use:
            return
        for name, parameter in layer.parameters.items():
            parameter.data = layer.resting[name]
        layer.free_buffers()
        layer.in_use, layer.present = False, []
        self._count_bytes(-layer.num_bytes)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
