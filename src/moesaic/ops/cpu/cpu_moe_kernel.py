"""CPUMoEKernel: an MoE layer's experts as one compiled C operation, and its autograd function.

Saved for backward: ``x`` and the pre-activation. Every value is one chain of float32 additions in a
fixed order, so results do not depend on the number of threads or the other rows of a batch.

Letters: T tokens, N edges, E experts, D model dim, F feed-forward dim, G pre-activation width.
"""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch.autograd.function import once_differentiable

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.ops.grouped_gemm import (
    GATED_ACTIVATIONS,
    ActivationFunction,
    FeedForwardWeights,
    report_products,
)
from moesaic.ops.moe_kernel import Edges, MoEKernel

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
ACTIVATION_CODES = {"relu": 0, "relu2": 1, "gelu": 2, "swiglu": 3}
_SIZE_FIELDS = (
    *("tokens", "experts", "dim", "hidden", "width", "activation"),
    *("x_dtype", "weight_dtype", "per_token", "threads"),
)
_POINTER_FIELDS = (
    *("x", "up", "down", "offsets", "token_of_row", "edge_of_row", "row_of_edge"),
    *("edges_by_token", "token_offsets", "weight", "pre_activation", "row_buffer", "out"),
    *("grad_out", "weighted_activation", "grad_pre_activation"),
    *("grad_x", "grad_up", "grad_down", "grad_weight"),
)


class MoEArguments(ctypes.Structure):
    """``moe_args`` of ``source/moe.h``, which documents the fields.

    Tensors whose addresses are in it must be contiguous and outlive the call.
    """

    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZE_FIELDS),
        *((name, ctypes.c_void_p) for name in _POINTER_FIELDS),
    )


class ExpertLibrary(Protocol):
    """Computes the experts on contiguous tensors, by the names of ``MoEArguments``."""

    def forward(self, sizes: Mapping[str, int], tensors: Mapping[str, Tensor | None]) -> None:
        """Fill ``out``, and ``pre_activation`` if it is given."""
        ...

    def backward(self, sizes: Mapping[str, int], tensors: Mapping[str, Tensor | None]) -> None:
        """Fill the gradients that are given."""
        ...


class CPULibrary:
    """The compiled library at a path. Calls release the GIL."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._forward, self._backward = library.moesaic_forward, library.moesaic_backward
        for function in (self._forward, self._backward):
            function.argtypes, function.restype = [ctypes.POINTER(MoEArguments)], ctypes.c_int

    def forward(self, sizes: Mapping[str, int], tensors: Mapping[str, Tensor | None]) -> None:
        _check_status(self._forward(_pack_arguments(sizes, tensors)))

    def backward(self, sizes: Mapping[str, int], tensors: Mapping[str, Tensor | None]) -> None:
        _check_status(self._backward(_pack_arguments(sizes, tensors)))


class ShapesOnlyLibrary:
    """Stands in for the library on fake tensors: names its products, and computes nothing.

    So a simulated step (``distributed/simulation.py``) has the memory and the FLOPs of the fused
    kernels, and compiles nothing. A backward pass has twice the products of a forward pass.
    """

    def forward(self, sizes: Mapping[str, int], tensors: Mapping[str, Tensor | None]) -> None:
        del sizes
        self._report(tensors, passes=1)

    def backward(self, sizes: Mapping[str, int], tensors: Mapping[str, Tensor | None]) -> None:
        del sizes
        self._report(tensors, passes=2)

    def _report(self, tensors: Mapping[str, Tensor | None], *, passes: int) -> None:
        x, up, down = tensors["x"], tensors["up"], tensors["down"]
        edges = tensors["edge_of_row"]
        assert x is not None
        assert up is not None
        assert down is not None
        assert edges is not None
        values = up.shape[1:].numel() + down.shape[1:].numel()
        report_products([x, up, down], flops=2 * passes * len(edges) * values)


def _pack_arguments(sizes: Mapping[str, int], tensors: Mapping[str, Tensor | None]) -> MoEArguments:
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    addresses = {name: tensor.data_ptr() for name, tensor in given.items()}
    freed = [name for name, tensor in given.items() if tensor.numel() and not addresses[name]]
    if freed:  # reading them would crash the process
        raise RuntimeError(
            f"{', '.join(freed)}: these tensors have a shape but no memory, like parameters that "
            "ZeRO has resharded and that are used outside of their module's forward or backward"
        )
    return MoEArguments(**sizes, **addresses)


def _check_status(code: int) -> None:
    if code:
        raise MemoryError("out of memory for the buffers of the experts")


@dataclass(frozen=True, slots=True)
class CPUMoEKernel:
    """The fused ``MoEKernel`` for a CPU; inputs that it does not support go to ``fallback``.

    Supports x and weights of float32 or bfloat16, without biases, and the activations of
    ``ACTIVATION_CODES``. bfloat16 is converted in registers: all sums are float32.
    """

    library: ExpertLibrary
    fallback: MoEKernel

    @property
    def name(self) -> str:
        return "fused"

    def __call__(
        self,
        x: Float[Tensor, "T D"],
        *,
        edges: Edges,
        weights: FeedForwardWeights,
        activation: ActivationFunction,
    ) -> Float[Tensor, "T D"]:
        if not supports(x, weights=weights, activation=activation):
            return self.fallback(x, edges=edges, weights=weights, activation=activation)
        inputs = (x, edges.weight, weights.up, weights.down)
        save = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
        # without a backward pass a larger buffer costs less than reading the number
        live_rows = int(edges.groups.offsets[-1]) if save else edges.token.numel()
        options = _CallOptions(
            self.library, activation.kernel_name, edges.per_token, live_rows, save
        )
        return _FusedMoE.apply(*inputs, _sort_edges(edges), options)


def supports(x: Tensor, *, weights: FeedForwardWeights, activation: ActivationFunction) -> bool:
    """Whether the compiled operation supports these inputs."""
    up, down, name = weights.up, weights.down, activation.kernel_name
    return (
        weights.up_bias is None
        and name in ACTIVATION_CODES
        and all(t.device.type == "cpu" and t.dtype in DTYPE_CODES for t in (x, up, down))
        and up.dtype == down.dtype
        and up.shape[-1] == down.shape[1] * (1 + (name in GATED_ACTIVATIONS))
    )


class _SortedEdges(NamedTuple):
    """The edge list as the C code reads it; the last two only if edges are not token-major."""

    edge_of_row: Int[Tensor, "N"]
    row_of_edge: Int[Tensor, "N"]
    offsets: Int[Tensor, "E"]
    token_of_row: Int[Tensor, "N"]
    edges_by_token: Int[Tensor, "N"] | None
    token_offsets: Int[Tensor, "T+1"] | None


class _CallOptions(NamedTuple):
    """Arguments that are no tensors; at most ``live_rows`` edges are not dropped."""

    library: ExpertLibrary
    activation: str
    per_token: int
    live_rows: int
    save_for_backward: bool

    def sizes(self, *, x: Tensor, up: Tensor, down: Tensor) -> dict[str, int]:
        experts, dim, width = up.shape
        return {
            "tokens": x.shape[0],
            "experts": experts,
            "dim": dim,
            "hidden": down.shape[1],
            "width": width,
            "activation": ACTIVATION_CODES[self.activation],
            "x_dtype": DTYPE_CODES[x.dtype],
            "weight_dtype": DTYPE_CODES[up.dtype],
            "per_token": self.per_token,
            "threads": torch.get_num_threads(),
        }


def _sort_edges(edges: Edges) -> _SortedEdges:
    groups, token = edges.groups, edges.token
    by_expert = (groups.order, groups.inverse, groups.offsets, token[groups.order])
    if edges.per_token:
        return _SortedEdges(*by_expert, None, None)
    offsets = torch.zeros(edges.num_tokens + 1, dtype=torch.long, device="cpu")
    torch.cumsum(torch.bincount(token, minlength=edges.num_tokens), 0, out=offsets[1:])
    return _SortedEdges(*by_expert, token.argsort(stable=True), offsets)


def _empty_float32(rows: int, columns: int) -> Tensor:
    """Allocate a buffer of the C code: float32 whatever torch's default dtype is."""
    return torch.empty(rows, columns, dtype=torch.float32, device="cpu")


class _FusedMoE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *floats, edges, options = inputs
        x, weight, up, down = (t.contiguous() for t in floats)
        weight, rows = weight.float(), options.live_rows
        out = torch.empty_like(x)
        hidden = _empty_float32(rows, up.shape[2]) if options.save_for_backward else None
        tensors = {"x": x, "up": up, "down": down, "weight": weight, "pre_activation": hidden}
        tensors |= {"row_buffer": _empty_float32(rows, x.shape[1]), "out": out}
        options.library.forward(options.sizes(x=x, up=up, down=down), tensors | edges._asdict())
        ctx.save_for_backward(x, weight, up, down, hidden, *edges)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, up, down, hidden, *edges = ctx.saved_tensors
        options, (for_x, for_weight, for_up, for_down, *_) = ctx.options, ctx.needs_input_grad
        rows, matrices = options.live_rows, for_up or for_down
        tensors = {
            "x": x,
            "up": up,
            "down": down,
            "weight": weight,
            "pre_activation": hidden,
            "row_buffer": _empty_float32(rows, x.shape[1]) if for_x else None,
            "grad_out": grads[0].contiguous(),
            "weighted_activation": _empty_float32(rows, down.shape[1]) if matrices else None,
            "grad_pre_activation": _empty_float32(rows, up.shape[2]) if matrices else None,
        }
        gradients = {
            "grad_x": torch.empty_like(x) if for_x else None,
            "grad_weight": torch.zeros_like(weight) if for_weight else None,
            "grad_up": torch.empty_like(up) if for_up else None,
            "grad_down": torch.empty_like(down) if for_down else None,
        }
        sizes = options.sizes(x=x, up=up, down=down)
        options.library.backward(sizes, tensors | gradients | _SortedEdges(*edges)._asdict())
        return *gradients.values(), None, None
