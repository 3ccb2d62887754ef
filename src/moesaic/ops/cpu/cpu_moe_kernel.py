"""The boundary to C: one struct of sizes and addresses, two functions.

The tensors whose addresses are in a ``Mixture`` must be contiguous and outlive the call.

Fused: the mixture as one compiled operation, and the autograd function around it.

It keeps x and the pre-activation for backward. Every number is one chain of float32 additions in
an order of its own, so the number of threads and the other rows of a batch change no bit of it.

Letters: T tokens, N edges, E experts, D model dim, F feed-forward dim, G width before activation.
"""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch.autograd.function import once_differentiable

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.ops.grouped_gemm import GATED_ACTIVATIONS, ActivationFunction, FeedForwardWeights
from moesaic.ops.moe_kernel import Edges, MoEKernel

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


@dataclass(frozen=True, slots=True)
class CPUMoEKernel:
    """One operation for what ``twin`` does in three; what it cannot do, the twin does.

    Takes x and banks of float32 or bfloat16, without biases, and the activations that have a
    ``kernel`` name. bfloat16 is widened in registers: all sums are float32.
    """

    library: CPULibraryProtocol
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
        live = int(edges.groups.offsets[-1])
        given = (x, edges.weight, weights.up, weights.down)
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in given)
        plan = _CallOptions(self.library, activation.kernel_name, edges.per_token, live, keep)
        return _FusedMoE.apply(x, edges.weight, weights.up, weights.down, _sort_edges(edges), plan)

    def saved_activations(self, *, dim: int, width: int, bias: bool, live_share: float) -> float:
        """The pre-activation of live edges, the weight, and three indices of eight bytes."""
        if bias:
            return self.fallback.saved_activations(
                dim=dim, width=width, bias=bias, live_share=live_share
            )
        return live_share * width + 1 + 3 * 2


def supports(x: Tensor, *, weights: FeedForwardWeights, activation: ActivationFunction) -> bool:
    """Whether the compiled operation covers these inputs."""
    held = (weights.up, weights.down)
    return (
        weights.up_bias is None
        and activation.kernel_name in ACTIVATION_CODES
        and all(t.device.type == "cpu" and t.dtype in DTYPE_CODES for t in (x, *held))
        and weights.up.dtype == weights.down.dtype
        and weights.up.shape[-1]
        == weights.down.shape[1] * (1 + (activation.kernel_name in GATED_ACTIVATIONS))
    )


class _SortedEdges(NamedTuple):
    """The edge list as the C code reads it; ``edge`` and ``first`` only if tokens are unordered."""

    order: Int[Tensor, "N"]
    place: Int[Tensor, "N"]
    ends: Int[Tensor, "E"]
    source: Int[Tensor, "N"]
    edge: Int[Tensor, "N"] | None
    first: Int[Tensor, "T+1"] | None


class _CallOptions(NamedTuple):
    """What is no tensor; ``live`` edges lead somewhere, ``keep`` says that a backward may come."""

    library: CPULibraryProtocol
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
            "x_kind": DTYPE_CODES[x.dtype],
            "w_kind": DTYPE_CODES[up.dtype],
            "per_token": self.per_token,
            "threads": torch.get_num_threads(),
        }


def _sort_edges(edges: Edges) -> _SortedEdges:
    groups, token = edges.groups, edges.token
    sorted_ = (groups.order, groups.inverse, groups.offsets, token[groups.order])
    if edges.per_token:
        return _SortedEdges(*sorted_, None, None)
    first = torch.zeros(edges.num_tokens + 1, dtype=torch.long, device="cpu")
    torch.cumsum(torch.bincount(token, minlength=edges.num_tokens), 0, out=first[1:])
    return _SortedEdges(*sorted_, token.argsort(stable=True), first)


def _empty_float32(rows: int, columns: int) -> Tensor:
    """Room for what the C code writes: float32 whatever torch's default is."""
    return torch.empty(rows, columns, dtype=torch.float32, device="cpu")


class _FusedMoE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *floats, index, plan = inputs
        x, weight, up, down = (t.contiguous() for t in floats)
        weight = weight.float()
        out = torch.empty_like(x)
        rows = _empty_float32(plan.live_rows, x.shape[1])
        pre = _empty_float32(plan.live_rows, up.shape[2]) if plan.save_for_backward else None
        tensors = {"x": x, "up": up, "down": down, "weight": weight, "pre": pre}
        tensors |= {"rows": rows, "out": out}
        plan.library.forward(plan.sizes(x=x, up=up, down=down), tensors | index._asdict())
        ctx.save_for_backward(x, weight, up, down, pre, *index)
        ctx.plan = plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, up, down, pre, *index = ctx.saved_tensors
        plan, (for_x, for_weight, for_up, for_down, *_) = ctx.plan, ctx.needs_input_grad
        matrices = for_up or for_down
        tensors = {
            "x": x,
            "up": up,
            "down": down,
            "weight": weight,
            "pre": pre,
            "rows": _empty_float32(plan.live_rows, x.shape[1]) if for_x else None,
            "grad": grads[0].contiguous(),
            "active": _empty_float32(plan.live_rows, down.shape[1]) if matrices else None,
            "grad_pre": _empty_float32(plan.live_rows, up.shape[2]) if matrices else None,
        }
        made = {
            "grad_x": torch.empty_like(x) if for_x else None,
            "grad_weight": torch.zeros_like(weight) if for_weight else None,
            "grad_up": torch.empty_like(up) if for_up else None,
            "grad_down": torch.empty_like(down) if for_down else None,
        }
        sizes = plan.sizes(x=x, up=up, down=down)
        plan.library.backward(sizes, tensors | made | _SortedEdges(*index)._asdict())
        return *made.values(), None, None
